#include "runner.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)  // clang
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_host {
namespace {

// --- stacks and switches between them --------------------------------------------------------------------

constexpr size_t kStackBytes = 256 * 1024;  // pages are allocated only when they are used

#ifdef __x86_64__

// Saves the registers that a call must preserve and the stack pointer, and continues on the other stack.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_host_switch, .-cuda_on_host_switch
.popsection
)");

class Context {
public:
    void start(char* stack, void (*entry)()) {
        // The stack pointer after `ret` is 8 bytes off a multiple of 16, as after a call.
        auto** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        pointer_ = top;
    }
    void go_to(Context& other) { cuda_on_host_switch(&pointer_, other.pointer_); }

private:
    void* pointer_ = nullptr;
};

#else

class Context {
public:
    void start(char* stack, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = kStackBytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void go_to(Context& other) { swapcontext(&context_, &other.context_); }

private:
    ucontext_t context_;
};

#endif

char* new_stack() {
    void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a kernel's threads");
    mprotect(stack, 4096, PROT_NONE);  // an overflow faults
    return static_cast<char*>(stack);
}

std::vector<char*>& free_stacks() {
    static auto& stacks = *new std::vector<char*>();
    return stacks;
}

// --- threads, blocks -------------------------------------------------------------------------------------

enum class State { kReady, kAtBarrier, kAtGrid, kInWarp, kEnded };

struct Thread {
    Context context;
    char* stack = nullptr;
    void* fake_stack = nullptr;
    Dim index;
    State state = State::kReady;
    Site site;
    WarpOp op = WarpOp::kSync;
    uint32_t mask = 0;
    uint64_t value = 0;
    int argument = 0;
};

struct Memory {
    std::unique_ptr<char, void (*)(void*)> bytes{nullptr, &std::free};
    size_t size = 0;
};

// A separate allocation, so that AddressSanitizer detects accesses past its end.
Memory fresh_memory(size_t bytes) {
    const size_t taken = bytes / 16 * 16 + 16;
    Memory memory{{static_cast<char*>(std::aligned_alloc(16, taken)), &std::free}, bytes};
    memset(memory.bytes.get(), 0xdb, bytes);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory.bytes.get() + bytes, taken - bytes);
#endif
    return memory;
}

struct Block {
    Dim index;
    std::vector<Thread> threads;
    std::vector<std::vector<int>> ready;  // of each warp
    std::vector<size_t> order;            // of warps
    bool in_order = false;
    size_t alive = 0;
    std::map<const void*, Memory> shared;
    Memory dynamic;
};

struct Refused {};

struct Run {
    const Launch* launch;
    const std::function<void()>* body;
    Context scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_bytes = 0;
    Block* block = nullptr;
    Thread* thread = nullptr;
    std::string refusal;
    std::mt19937 random;
    unsigned seed = 0;
};

Run* run_;

std::string name(const Block& block, const Thread& t) {
    std::ostringstream text;
    text << "thread " << t.index.x << " of block (" << block.index.x << ", " << block.index.y << ")";
    return text.str();
}

bool same(const Site& a, const Site& b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

std::string name(const Site& site) {
    const std::string file = site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void to_scheduler() {
    Thread& self = *run_->thread;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(self.state == State::kEnded ? nullptr : &self.fake_stack,
                                   run_->scheduler_stack, run_->scheduler_bytes);
#endif
    self.context.go_to(run_->scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void enter() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &run_->scheduler_stack, &run_->scheduler_bytes);
#endif
    (*run_->body)();
    run_->thread->state = State::kEnded;
    to_scheduler();
}

void resume(Block& block, Thread& t) {
    run_->block = &block;
    run_->thread = &t;
    thread_index = t.index;
    block_index = block.index;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, t.stack, kStackBytes);
#endif
    run_->scheduler.go_to(t.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    run_->thread = nullptr;
}

// Only the scheduler throws: an exception must not leave a fiber's stack.
[[noreturn]] void refuse(const std::string& why) {
    run_->refusal = why;
    throw Refused();
}

void make_ready(Block& block, Thread& t) {
    t.state = State::kReady;
    block.ready[t.index.x / 32].push_back(static_cast<int>(t.index.x));
}

// --- warp operations -------------------------------------------------------------------------------------

uint64_t result_of(const Block& block, const Thread& t, Thread* const lanes[32]) {
    const int self = static_cast<int>(t.index.x % 32);
    uint64_t result = 0;
    int source = self;
    switch (t.op) {
        case WarpOp::kSync:
            return 0;
        case WarpOp::kBallot:
            for (int i = 0; i < 32; ++i)
                if (lanes[i] && lanes[i]->value) result |= uint64_t{1} << i;
            return result;
        case WarpOp::kAdd:
        case WarpOp::kMin:
        case WarpOp::kMax:
            result = t.value;
            for (int i = 0; i < 32; ++i) {
                if (!lanes[i] || lanes[i] == &t) continue;
                const uint64_t other = lanes[i]->value;
                result = t.op == WarpOp::kAdd   ? uint32_t(result + other)
                         : t.op == WarpOp::kMin ? std::min(result, other)
                                                : std::max(result, other);
            }
            return result;
        case WarpOp::kShuffle:
            source = t.argument & 31;
            break;
        case WarpOp::kUp:
            source = self - t.argument < 0 ? self : self - t.argument;
            break;
        case WarpOp::kDown:
            source = self + t.argument > 31 ? self : self + t.argument;
            break;
        case WarpOp::kXor:
            source = self ^ t.argument;
            break;
    }
    if (source < 0 || source > 31 || !lanes[source])
        refuse(name(block, t) + " reads at " + name(t.site) + " from lane " + std::to_string(source) +
               ", which the mask does not name");
    return lanes[source]->value;
}

// If all lanes of the mask have reached the operation, computes their results and makes them ready.
void try_warp(Block& block, Thread& t) {
    const size_t first = t.index.x / 32 * 32;
    Thread* lanes[32] = {};
    if (!(t.mask >> (t.index.x % 32) & 1))
        refuse(name(block, t) + " is not in its own mask at " + name(t.site));
    bool complete = true;
    for (int i = 0; i < 32; ++i) {
        if (!(t.mask >> i & 1)) continue;
        Thread& other = block.threads[first + i];
        const auto here = [&] {
            return name(block, t) + " waits at " + name(t.site) + " for lane " + std::to_string(i);
        };
        if (other.state == State::kEnded) refuse(here() + ", which has ended");
        lanes[i] = &other;
        if (other.state == State::kInWarp && other.op == t.op && other.mask == t.mask &&
            same(other.site, t.site))
            continue;
        complete = false;  // it may do something else first, unless that waits for this thread
        if (other.state == State::kInWarp && other.mask >> (t.index.x % 32) & 1)
            refuse(here() + ", which waits for it at " + name(other.site) +
                   " with another mask or operation");
    }
    if (!complete) return;
    uint64_t results[32];
    for (int i = 0; i < 32; ++i)
        if (lanes[i]) results[i] = result_of(block, *lanes[i], lanes);
    for (int i = 0; i < 32; ++i)
        if (lanes[i]) lanes[i]->value = results[i], make_ready(block, *lanes[i]);
}

// --- the scheduler ---------------------------------------------------------------------------------------

// All threads wait for a barrier: makes them ready if it is the same one.
void release(Block& block, const char* what) {
    const Thread* first = nullptr;
    for (Thread& t : block.threads) {
        if (t.state == State::kEnded) continue;
        if (!first) first = &t;
        if (!same(t.site, first->site))
            refuse(std::string("threads of a block wait at different ") + what + ": " + name(first->site) +
                   " and " + name(t.site));
        make_ready(block, t);
    }
}

size_t count(const Block& block, State state) {
    return std::count_if(block.threads.begin(), block.threads.end(),
                         [&](const Thread& t) { return t.state == state; });
}

// The thread that runs next, or null. In some blocks all warps advance at about the same rate; in others one
// warp runs as far as it can before the next one starts, which makes a missing barrier visible.
Thread* next_thread(Block& block) {
    const size_t warps = block.ready.size(), start = block.in_order ? 0 : run_->random() % warps;
    for (size_t i = 0; i < warps; ++i) {
        auto& ready = block.ready[block.order[(start + i) % warps]];
        if (ready.empty()) continue;
        std::swap(ready[run_->random() % ready.size()], ready.back());
        Thread& t = block.threads[ready.back()];
        ready.pop_back();
        return &t;
    }
    return nullptr;
}

// Runs a block until its threads have ended or all wait for the grid.
void run_block(Block& block) {
    for (;;) {
        while (Thread* const next = next_thread(block)) {
            Thread& t = *next;
            resume(block, t);
            if (!run_->refusal.empty()) throw Refused();
            if (t.state == State::kEnded) --block.alive;
            if (t.state == State::kInWarp) try_warp(block, t);
        }
        if (block.alive == 0 || count(block, State::kAtGrid) == block.threads.size()) return;
        if (count(block, State::kAtBarrier) != block.alive) {
            for (Thread& t : block.threads) {
                if (t.state != State::kInWarp) continue;
                try_warp(block, t);  // refuses with a better sentence if a lane has ended since
                refuse(name(block, t) + " waits at " + name(t.site) + " for lanes that never come");
            }
            refuse("some threads of a block wait for the grid, and others have ended or wait for the block");
        }
        release(block, "barriers");
    }
}

std::unique_ptr<Block> new_block(size_t number) {
    auto block = std::make_unique<Block>();
    block->index = {static_cast<unsigned>(number % grid_size.x), static_cast<unsigned>(number / grid_size.x),
                    0};
    block->threads.resize(block_size.x);
    block->alive = block_size.x;
    block->ready.resize(block_size.x / 32);
    for (size_t warp = 0; warp < block->ready.size(); ++warp) block->order.push_back(warp);
    std::shuffle(block->order.begin(), block->order.end(), run_->random);
    block->in_order = run_->random() % 2;
    block->dynamic = fresh_memory(run_->launch->dynamic_shared);
    for (unsigned i = 0; i < block_size.x; ++i) {
        Thread& t = block->threads[i];
        t.index = {i, 0, 0};
        if (free_stacks().empty()) free_stacks().push_back(new_stack());
        t.stack = free_stacks().back();
        free_stacks().pop_back();
        t.context.start(t.stack, &enter);
        make_ready(*block, t);
    }
    return block;
}

void give_back(Block& block) {
    for (const Thread& t : block.threads) {
#ifdef __SANITIZE_ADDRESS__
        if (t.state != State::kEnded) ASAN_UNPOISON_MEMORY_REGION(t.stack + 4096, kStackBytes - 4096);
#endif
        free_stacks().push_back(t.stack);
    }
}

void run_all(size_t blocks) {
    std::vector<size_t> order(blocks);
    for (size_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), run_->random);
    std::vector<std::unique_ptr<Block>> resident;
    const auto finish = [&] {
        for (auto& block : resident) give_back(*block);
        resident.clear();
    };
    try {
        if (!run_->launch->cooperative) {
            for (const size_t number : order) {
                resident.push_back(new_block(number));
                run_block(*resident[0]);
                if (resident[0]->alive > 0) refuse("a launch that is not cooperative waits for its grid");
                finish();
            }
            return;
        }
        for (const size_t number : order) resident.push_back(new_block(number));
        for (size_t alive = blocks; alive > 0;) {
            alive = 0;
            for (auto& block : resident) run_block(*block), alive += block->alive > 0;
            if (alive > 0 && alive < blocks) refuse("some blocks wait for the grid, and others have ended");
            for (auto& block : resident) {
                if (alive > 0 && !same(block->threads[0].site, resident[0]->threads[0].site))
                    refuse("blocks wait for the grid at different places: " +
                           name(resident[0]->threads[0].site) + " and " + name(block->threads[0].site));
                release(*block, "grid barriers");
            }
            std::shuffle(resident.begin(), resident.end(), run_->random);
        }
        finish();
    } catch (...) {
        finish();
        throw;
    }
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& thread) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    static std::mt19937 seeds(std::random_device{}());
    Run state{};
    const char* const seed = std::getenv("CUDA_ON_HOST_SEED");
    state.seed =
        seed ? static_cast<unsigned>(std::strtoul(seed, nullptr, 10)) : static_cast<unsigned>(seeds());
    state.random.seed(state.seed);
    state.launch = &launch;
    state.body = &thread;
    block_size = launch.threads;
    grid_size = launch.blocks;
    run_ = &state;
    try {
        run_all(size_t{launch.blocks.x} * launch.blocks.y);
    } catch (const Refused&) {
        throw std::runtime_error("kernel refused: " + state.refusal +
                                 " (CUDA_ON_HOST_SEED=" + std::to_string(state.seed) + ")");
    }
}

void wait_for_block(Site site) {
    run_->thread->state = State::kAtBarrier;
    run_->thread->site = site;
    to_scheduler();
}

void wait_for_grid(Site site) {
    run_->thread->state = State::kAtGrid;
    run_->thread->site = site;
    to_scheduler();
}

uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, int argument, Site site) {
    Thread& t = *run_->thread;
    t.state = State::kInWarp;
    t.op = op;
    t.mask = mask;
    t.value = value;
    t.argument = argument;
    t.site = site;
    to_scheduler();
    return t.value;
}

void* shared_memory(const void* variable, size_t bytes) {
    Memory& memory = run_->block->shared[variable];
    if (!memory.bytes) memory = fresh_memory(bytes);
    size_t total = run_->block->dynamic.size;
    for (const auto& each : run_->block->shared) total += each.second.size;
    if (total > kSharedLimit) {
        run_->refusal = "a block takes more than " + std::to_string(kSharedLimit) + " bytes of shared memory";
        to_scheduler();
    }
    return memory.bytes.get();
}

void* dynamic_shared_memory() { return run_->block->dynamic.bytes.get(); }

}  // namespace cuda_on_host
