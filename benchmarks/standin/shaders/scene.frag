#version 420
in vec3 P, N, Q; in vec2 T; in vec4 L; out vec4 o;
layout(binding = 0) uniform sampler2D tex; layout(binding = 1) uniform sampler2D shade; uniform vec3 key, sun, sky, ground, tint; uniform float rough, skin, exposure, window;
void main() {
  vec3 n = normalize(N), v = normalize(-P); if (dot(n, v) < 0.) n = -n;
  vec3 a = pow(texture(tex, T).rgb, vec3(2.2)) * tint;
  if (skin > 0.) { a *= mix(vec3(.86, .78, .76), vec3(1.12, 1.1, 1.08), a.r); a = mix(a, tint, .3);
    float tip = smoothstep(.11, .17, -Q.z); a *= mix(vec3(1), vec3(1.06, .86, .84), tip); }
  vec3 s = L.xyz / L.w * .5 + .5; float lit = 0., b = .004 + .006 * (1. - max(dot(n, key), 0.));
  for (int i = 0; i < 4; i++) lit += s.z - b < texture(shade, s.xy + (vec2(i & 1, i >> 1) - .5) / 200.).r ? .25 : 0.;
  float d = dot(n, key), w = skin > 0. ? .25 : .0; d = max((d + w) / (1. + w), 0.);
  float h = n.y * .5 + .5; vec3 amb = mix(ground, sky, h) * (.65 + .35 * max(n.z, 0.));
  vec3 c = a * (sun * d * lit + amb);
  vec3 r = reflect(-v, n); float f = .04 + .6 * pow(1. - max(dot(n, v), 0.), 5.) * (1. - rough);
  vec3 env = mix(ground, sky, smoothstep(-.3, .5, r.y)) * .8; float e = 2. / (rough * rough * rough + .003);
  env += sun * lit * pow(max(dot(r, key), 0.), e) * min(e * .12, 30.);
  env += sky * window * smoothstep(.05 + rough * .4, .0, max(abs(r.x - .45) - .22, abs(r.y - .35) - .3)) * (1. - rough) * 2.5;
  c += env * f * (skin > 0. ? .5 : 1.);
  c *= exposure; c = c / (1. + .18 * c * c);  o = vec4(pow(clamp(c, 0., 1.), vec3(1. / 2.2)), 1); }
