// The scheduler behind simt.h: fibers of one block, their barriers, and what warps compute together.

#include "simt.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

thread_local Dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned WARP = 32;

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "simt: %s, block (%u, %u), thread %u\n", what, block_index.x, block_index.y, thread_index.x);
    abort();
}

// Saves the callee's registers on the current stack, stores its pointer in *from and goes on where `to` was saved.
extern "C" void simt_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.local simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#else
#error "the SIMT shim switches stacks on x86-64 only"
#endif

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    bool there;
};

struct Fiber {
    void* stack_pointer = nullptr;
    // Groups of copies committed and not waited for, oldest first, and the group being filled.
    std::vector<std::vector<Copy>> committed;
    std::vector<Copy> open;
};

struct Warp {
    unsigned arrived = 0;
    Op op = Op::Sync;
    Lane* lanes[WARP];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> ready;
    std::vector<unsigned> at_barrier;
    unsigned alive = 0;
    unsigned current = 0;
    void* scheduler = nullptr;
    Entry entry = nullptr;
    void** args = nullptr;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    uint64_t random = 0;
};

thread_local Block* block = nullptr;

// Stacks of the largest block there can be, kept from launch to launch; pages cost nothing until they are used.
struct Stacks {
    unsigned char* base = nullptr;

    unsigned char* get() {
        if (base == nullptr) {
            void* pages = mmap(nullptr, STACK_BYTES * 1024, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (pages == MAP_FAILED) {
                fail("no memory for stacks");
            }
            base = static_cast<unsigned char*>(pages);
        }
        return base;
    }
    ~Stacks() {
        if (base != nullptr) {
            munmap(base, STACK_BYTES * 1024);
        }
    }
};
thread_local Stacks kept_stacks;

std::map<std::string, Entry>& registry() {
    static std::map<std::string, Entry> entries;
    return entries;
}

uint64_t draw(uint64_t& state) {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Goes on with any fiber that can; returns when this one is chosen again.
void wait_turn() {
    Block& b = *block;
    unsigned self = b.current;
    simt_switch(&b.fibers[self].stack_pointer, b.scheduler);
}

void fiber_main() {
    Block& b = *block;
    b.entry(b.args);
    b.alive--;
    void* gone;
    simt_switch(&gone, b.scheduler);
    fail("a finished thread was resumed");
}

void schedule() {
    Block& b = *block;
    while (b.alive > 0) {
        if (b.ready.empty()) {
            fail(b.at_barrier.empty() ? "a warp waits for lanes that have ended or wait elsewhere"
                                      : "threads wait at a block barrier that others do not reach");
        }
        size_t pick = draw(b.random) % b.ready.size();
        b.current = b.ready[pick];
        b.ready[pick] = b.ready.back();
        b.ready.pop_back();
        thread_index = {b.current, 0, 0};
        simt_switch(&b.scheduler, b.fibers[b.current].stack_pointer);
    }
}

float bf16_half(uint32_t pair, int half) { return float_of(half ? pair & 0xffff0000u : pair << 16); }
float f16_half(uint32_t pair, int half) { return f32_of_f16(static_cast<uint16_t>(half ? pair >> 16 : pair)); }

template <float (*HALF)(uint32_t, int)>
void multiply_halves(Lane** lanes) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; half++) {
            for (int part = 0; part < 4; part++) {
                a[g + part % 2 * 8][part / 2 * 8 + 2 * t + half] = HALF(lanes[lane]->in[part], half);
            }
            for (int part = 0; part < 2; part++) {
                b[g][part * 8 + 2 * t + half] = HALF(lanes[lane]->in[4 + part], half);
            }
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            float sum = float_of(lanes[lane]->out[i]);
            for (int k = 0; k < 16; k++) {
                sum += row[k] * column[k];
            }
            lanes[lane]->out[i] = bits_of(sum);
        }
    }
}

void multiply_tf32(Lane** lanes) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int part = 0; part < 4; part++) {
            a[g + part % 2 * 8][part / 2 * 4 + t] = float_of(lanes[lane]->in[part] & ~0x1fffu);
        }
        for (int part = 0; part < 2; part++) {
            b[g][part * 4 + t] = float_of(lanes[lane]->in[4 + part] & ~0x1fffu);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            float sum = float_of(lanes[lane]->out[i]);
            for (int k = 0; k < 8; k++) {
                sum += row[k] * column[k];
            }
            lanes[lane]->out[i] = bits_of(sum);
        }
    }
}

void multiply_s8(Lane** lanes) {
    alignas(64) int16_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int byte = 0; byte < 4; byte++) {
            for (int part = 0; part < 4; part++) {
                a[g + part % 2 * 8][part / 2 * 16 + 4 * t + byte] =
                    static_cast<int8_t>(lanes[lane]->in[part] >> (8 * byte));
            }
            for (int part = 0; part < 2; part++) {
                b[g][part * 16 + 4 * t + byte] = static_cast<int8_t>(lanes[lane]->in[4 + part] >> (8 * byte));
            }
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            const int16_t *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            int32_t sum = 0;
            for (int k = 0; k < 32; k++) {
                sum += row[k] * column[k];
            }
            lanes[lane]->out[i] += static_cast<uint32_t>(sum);
        }
    }
}

void read_matrices(Lane** lanes, bool transposed) {
    for (int lane = 0; lane < 32; lane++) {
        if (reinterpret_cast<uintptr_t>(lanes[lane]->address) % 16 != 0) {
            fail("a row of a matrix in shared memory is not 16-byte aligned");
        }
    }
    for (int matrix = 0; matrix < 4; matrix++) {
        for (int lane = 0; lane < 32; lane++) {
            uint16_t pair[2];
            for (int half = 0; half < 2; half++) {
                int row = transposed ? lane % 4 * 2 + half : lane / 4;
                int column = transposed ? lane / 4 : lane % 4 * 2 + half;
                pair[half] = static_cast<const uint16_t*>(lanes[matrix * 8 + row]->address)[column];
            }
            lanes[lane]->out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
        }
    }
}

void compute(Warp& warp) {
    Lane** lanes = warp.lanes;
    switch (warp.op) {
        case Op::Sync:
            break;
        case Op::Shuffle:
            for (unsigned lane = 0; lane < WARP; lane++) {
                lanes[lane]->out[0] = lanes[lane ^ lanes[lane]->in[1]]->in[0];
            }
            break;
        case Op::Any: {
            uint32_t any = 0;
            for (unsigned lane = 0; lane < WARP; lane++) {
                any |= lanes[lane]->in[0];
            }
            for (unsigned lane = 0; lane < WARP; lane++) {
                lanes[lane]->out[0] = any;
            }
            break;
        }
        case Op::MmaBf16:
            return multiply_halves<bf16_half>(lanes);
        case Op::MmaF16:
            return multiply_halves<f16_half>(lanes);
        case Op::MmaTf32:
            return multiply_tf32(lanes);
        case Op::MmaS8:
            return multiply_s8(lanes);
        case Op::Matrices:
            return read_matrices(lanes, false);
        case Op::MatricesTransposed:
            return read_matrices(lanes, true);
    }
}

}  // namespace

void collective(Op op, Lane& lane) {
    Block& b = *block;
    Warp& warp = b.warps[b.current / WARP];
    if (warp.arrived > 0 && warp.op != op) {
        fail("lanes of one warp are at different collectives");
    }
    warp.op = op;
    warp.lanes[b.current % WARP] = &lane;
    if (++warp.arrived < WARP) {
        return wait_turn();
    }
    warp.arrived = 0;
    compute(warp);
    // Lanes stay valid: each lies on the stack of a fiber that has not gone on.
    for (unsigned other = b.current / WARP * WARP; other < (b.current / WARP + 1) * WARP; other++) {
        b.ready.push_back(other);
    }
    wait_turn();
}

void barrier_block() {
    Block& b = *block;
    b.at_barrier.push_back(b.current);
    if (b.at_barrier.size() == b.fibers.size()) {
        b.ready.insert(b.ready.end(), b.at_barrier.begin(), b.at_barrier.end());
        b.at_barrier.clear();
    }
    wait_turn();
}

void copy_async(void* to, const void* from, unsigned bytes, bool there) {
    if ((reinterpret_cast<uintptr_t>(to) | (there ? reinterpret_cast<uintptr_t>(from) : 0)) % bytes != 0) {
        fail("an asynchronous copy is not aligned to its size");
    }
    // What was there is lost at once, and what comes is not there before the wait.
    memset(to, 0xff, bytes);
    block->fibers[block->current].open.push_back({to, from, bytes, there});
}

void copy_commit() {
    Fiber& fiber = block->fibers[block->current];
    fiber.committed.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void copy_wait(int pending) {
    Fiber& fiber = block->fibers[block->current];
    while (fiber.committed.size() > static_cast<size_t>(pending)) {
        for (const Copy& copy : fiber.committed.front()) {
            if (copy.there) {
                memcpy(copy.to, copy.from, copy.bytes);
            } else {
                memset(copy.to, 0, copy.bytes);
            }
        }
        fiber.committed.erase(fiber.committed.begin());
    }
    // Others may run before this one goes on.
    block->ready.push_back(block->current);
    wait_turn();
}

unsigned char* dynamic_shared() { return block->shared; }

Registration::Registration(const char* name, Entry entry) { registry()[name] = entry; }

}  // namespace simt

// Runs one kernel; false if there is none of this name. Blocks run one after another, in an order drawn from `seed`.
extern "C" bool simt_launch(const char* name, const unsigned* grid, unsigned threads, size_t shared_bytes, void** args,
                            uint64_t seed) {
    using namespace simt;
    auto found = registry().find(name);
    if (found == registry().end()) {
        return false;
    }
    if (threads == 0 || threads % WARP != 0 || threads > 1024) {
        fail("a block is a whole number of warps, at most 32");
    }
    Block b;
    b.fibers.resize(threads);
    b.warps.resize(threads / WARP);
    b.entry = found->second;
    b.args = args;
    b.shared_bytes = shared_bytes;
    b.random = seed;
    // Exact size, so that a sanitizer sees the first byte beyond.
    b.shared = static_cast<unsigned char*>(aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
    unsigned char* stacks = kept_stacks.get();
    block = &b;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {threads, 1, 1};
    uint64_t blocks = static_cast<uint64_t>(grid[0]) * grid[1] * grid[2];
    uint64_t first = blocks > 0 ? draw(b.random) % blocks : 0;
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t number = (first + i) % blocks;
        block_index = {static_cast<unsigned>(number % grid[0]), static_cast<unsigned>(number / grid[0] % grid[1]),
                       static_cast<unsigned>(number / grid[0] / grid[1])};
        if (shared_bytes > 0) {
            memset(b.shared, 0xff, shared_bytes);
        }
        for (unsigned thread = 0; thread < threads; thread++) {
            Fiber& fiber = b.fibers[thread];
            fiber.committed.clear();
            fiber.open.clear();
#if defined(__SANITIZE_ADDRESS__)
            // The thread before this one left its last frame without returning.
            __asan_unpoison_memory_region(stacks + STACK_BYTES * thread, STACK_BYTES);
#endif
            // Six registers and the address to return to; the stack is as after a call, 8 past a multiple of 16.
            void** top = reinterpret_cast<void**>(stacks + STACK_BYTES * (thread + 1)) - 8;
            memset(top, 0, 8 * sizeof(void*));
            top[6] = reinterpret_cast<void*>(&fiber_main);
            fiber.stack_pointer = top;
            b.ready.push_back(thread);
        }
        b.alive = threads;
        schedule();
    }
    block = nullptr;
    free(b.shared);
    return true;
}
