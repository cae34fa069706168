// One way to run on several threads: OpenMP where the compiler has it, else the calling thread alone.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace trimtab {
namespace {

// f(thread, threads, barrier) on `wanted` threads, or fewer if the runtime gives fewer. f must not throw.
template <class F>
void parallel(int wanted, F&& f) {
#ifdef _OPENMP
  if (wanted > 1) {
#pragma omp parallel num_threads(wanted)
    f(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    return;
  }
#endif
  (void)wanted;
  f(0, 1, [] {});
}

}  // namespace

// One of the threads of `parallel`, for functions that are called by all of them.
struct Team {
  int id, count;
  void wait() const {
#ifdef _OPENMP
    if (count > 1) {
#pragma omp barrier
    }
#endif
  }
};

}  // namespace trimtab
