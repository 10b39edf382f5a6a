// Chooses the instruction set of the vectorised kernels.
#include "kernels.h"

#include <atomic>
#include <cstring>

namespace batchkern {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

const Kernels* const* instruction_sets() {
    static const Kernels* found[4] = {};
    static const bool once = [] {
        const Kernels** next = found;
#if defined(__x86_64__)
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (avx2 && avx512) *next++ = &avx512::table;
        if (avx2) *next++ = &avx2::table;
#endif
        *next = &baseline::table;
        return true;
    }();
    (void)once;
    return found;
}

static std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> chosen{instruction_sets()[0]};
    return chosen;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_instruction_set(const char* name) {
    for (const Kernels* const* set = instruction_sets(); *set; ++set) {
        if (std::strcmp((*set)->instruction_set, name) == 0) {
            current() = *set;
            return true;
        }
    }
    return false;
}

}  // namespace batchkern
