// Reaches the noise contract as the compiler builds it for one instruction set, without torch:
// tests/test_noise.py compiles this with the flags of setup.py, writes records to stdin and reads records
// from stdout.
#include <cmath>
#include <cstdio>

#include "step_cpu.cpp"

namespace {

namespace isa = fastdiff::FASTDIFF_ISA;

template <class In, class Out, class Fn>
int each(Fn fn) {
  In in;
  while (fread(&in, sizeof(in), 1, stdin) == 1) {
    const Out out = fn(in);
    fwrite(&out, sizeof(out), 1, stdout);
  }
  return 0;
}

struct Counter {
  uint64_t word[4], seed;
};
struct Words {
  uint32_t word[4];
};
struct Triple {
  float a, b, c;
};
struct Fused {
  float ours, libm;
};
struct Elements {
  int64_t first, count;
  uint64_t seed, t, domain, repeat;
};

template <class Word>
Words philox(const Counter& in) {
  Word c[4] = {Word(in.word[0]), Word(in.word[1]), Word(in.word[2]), Word(in.word[3])};
  fastdiff::philox4x32_10(c, in.seed);
  return {{uint32_t(c[0]), uint32_t(c[1]), uint32_t(c[2]), uint32_t(c[3])}};
}

Fused fused(const Triple& v) { return {fastdiff::fma_exact(v.a, v.b, v.c), std::fma(v.a, v.b, v.c)}; }

int normals() {
  Elements e;
  float z[8192];
  while (fread(&e, sizeof(e), 1, stdin) == 1) {
    isa::normals(z, e.first, e.count, {e.seed, uint32_t(e.t), uint32_t(e.domain), uint32_t(e.repeat)});
    fwrite(z, sizeof(float), size_t(e.count), stdout);
  }
  return 0;
}

}  // namespace

int main(int, char** argv) {
  switch (argv[1][0]) {
    case 'p': return each<Counter, Words>(philox<uint32_t>);
    case 'P': return each<Counter, Words>(philox<uint64_t>);
    case 'f': return each<Triple, Fused>(fused);
    case 'e': return each<float, float>([](float v) { return fastdiff::exp_fixed(v); });
    case 'E': return each<double, double>([](double v) { return fastdiff::exp_fixed(v); });
    case 'h': return each<uint16_t, float>(fastdiff::Float16::load);
    case 'H': return each<float, uint16_t>(fastdiff::Float16::store);
    case 'b': return each<uint16_t, float>(fastdiff::BFloat16::load);
    case 'B': return each<float, uint16_t>(fastdiff::BFloat16::store);
    case 'n': return normals();
  }
  return 1;
}
