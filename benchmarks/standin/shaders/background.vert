#version 330
in vec2 p; uniform vec2 at; uniform vec4 pan; uniform float tilt; out vec2 T;
void main() {
  float a = .04 * pan.x + tilt, c = cos(a) * .27 * (1. + .05 * pan.y), s = sin(a) * .27;
  T = vec2(c * p.x - s * p.y + .5 + .10 * pan.z, -s * p.x - c * p.y + .5 + .08 * pan.w) + at; gl_Position = vec4(p, .9999, 1); }
