#version 330
in vec2 T; uniform sampler2D tex; uniform float gain; out vec4 o; void main() { o = vec4(clamp(texture(tex, T).rgb * gain, 0., 1.), 1); }
