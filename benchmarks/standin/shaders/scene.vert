#version 330
// key: direction of the light; its camera, for the shadows (dark > 0), looks at center and sees .22 m to each side
in vec3 p; in vec3 n; in vec2 t; uniform mat4 M; uniform vec3 key, center; uniform float dark; out vec3 P, N, Q; out vec2 T; out vec4 L;
void main() {
  vec4 w = M * vec4(p, 1); P = w.xyz; N = mat3(M) * n; T = t; Q = p;
  vec3 x = normalize(cross(vec3(0, 1, .1), key)), d = (w.xyz - center) / .22; L = vec4(dot(x, d), dot(cross(key, x), d), -dot(key, d), 1);
  gl_Position = dark > 0. ? L : vec4(4.897959 * w.xy, -1.1052632 * w.z - .21052632, -w.z); }
