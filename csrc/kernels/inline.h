// What the kernels ask of the compiler: everything inline, and short loops unrolled in full.
#pragma once

#ifdef LLAMA2_SANITIZED  // whose checks make every operation long: calls compile faster
#define LLAMA2_NO_UNROLL
#define INLINE static inline __attribute__((unused))
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#define PRAGMA(text) _Pragma(#text)
#ifdef LLAMA2_NO_UNROLL
#define UNROLL(times)
#else
#define UNROLL(times) PRAGMA(GCC unroll times)
#endif
// for i in [0, count), which is at most `times`. NOLINTNEXTLINE(bugprone-macro-parentheses)
#define UNROLLED(times, i, count) UNROLL(times) for (int i = 0; i < (count); ++i)
