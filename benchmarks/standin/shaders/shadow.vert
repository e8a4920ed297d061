#version 330
in vec3 p; uniform mat4 M; uniform vec3 key, center;
void main() {
  vec4 w = M * vec4(p, 1);
  vec3 x = normalize(cross(vec3(0, 1, .1), key)), d = (w.xyz - center) / .22;
  gl_Position = vec4(dot(x, d), dot(cross(key, x), d), -dot(key, d), 1); }
