/* shim_fiber.cpp - see shim_fiber.h. Assembly where it is known (x86-64, ELF), else ucontext, which is slow: it asks the kernel for the signal mask. */
#include "shim_fiber.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#ifdef KVS_SHIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && defined(__ELF__) && !defined(KVS_SHIM_UCONTEXT)
#define FIBER_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#ifdef KVS_SHIM_ASAN
static const size_t STACK = 512 * 1024; /* its frames are many times as large */
#else
static const size_t STACK = 128 * 1024; /* kernels compiled without optimization, too; pages that nobody touches cost nothing */
#endif

struct kvs_fiber {
    uint8_t *stack; /* (STACK) behind a page that faults; NULL: the host thread's own */
    size_t colour;  /* stacks begin at different lines of a page, or their tops would fight for the same places in the cache */
#ifdef FIBER_ASSEMBLY
    void *sp;
#else
    ucontext_t context;
#endif
#ifdef KVS_SHIM_ASAN
    void *fake;         /* AddressSanitizer's frames of this one */
    const void *bottom; /* of the host's stack, as it was told */
    size_t bytes;
#endif
};

#ifdef FIBER_ASSEMBLY
extern "C" void kvs_fiber_swap(void **save, void *to);
/* All registers that a function must keep, and the control words of SSE and x87, which are slow to load and nearly always the same. */
asm(R"(
.pushsection .text
.p2align 4
.globl kvs_fiber_swap
.hidden kvs_fiber_swap
.type kvs_fiber_swap, @function
kvs_fiber_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movl (%rsp), %eax
    movzwl 4(%rsp), %ecx
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    cmpl (%rsp), %eax
    je 1f
    ldmxcsr (%rsp)
1:  cmpw 4(%rsp), %cx
    je 2f
    fldcw 4(%rsp)
2:  addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvs_fiber_swap, . - kvs_fiber_swap
.popsection
)");
#endif

static void prepare(kvs_fiber *f, void (*entry)(void)) {
    uint8_t *top = f->stack + STACK - f->colour;
#ifdef FIBER_ASSEMBLY
    uint64_t *words = (uint64_t *)(void *)top; /* top is a multiple of 16 */
    words[-1] = 0;                             /* where entry would return to: the end of every backtrace */
    words[-2] = (uint64_t)(uintptr_t)entry;
    for (int i = 3; i <= 8; i++) words[-i] = 0;
    uint32_t control[2] = {0, 0};
    __asm__ volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(control[0]), "=m"(control[1]));
    words[-9] = control[0] | (uint64_t)control[1] << 32;
    f->sp = words - 9;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = (size_t)(top - f->stack);
    f->context.uc_link = nullptr;
    makecontext(&f->context, entry, 0);
#endif
}

struct fiber_pool { /* of a host thread: all that it ever needed at once */
    std::vector<kvs_fiber *> all, spare;
    kvs_fiber host = {};
    ~fiber_pool() {
        for (kvs_fiber *f : all) {
            munmap(f->stack - (size_t)getpagesize(), STACK + (size_t)getpagesize());
            delete f;
        }
    }
};
static thread_local fiber_pool pool;

kvs_fiber *kvs_fiber_host(void) { return &pool.host; }

static kvs_fiber *new_stack(void) {
    size_t page = (size_t)getpagesize();
    void *memory = mmap(nullptr, page + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) {
        perror("kvs shim: no memory for a stack");
        abort();
    }
    kvs_fiber *f = new kvs_fiber();
    f->stack = (uint8_t *)memory + page;
    f->colour = pool.all.size() % 32 * 128;
    pool.all.push_back(f);
    return f;
}

kvs_fiber *kvs_fiber_new(void (*entry)(void)) {
    kvs_fiber *f;
    if (pool.spare.empty())
        f = new_stack();
    else {
        f = pool.spare.back();
        pool.spare.pop_back();
    }
#ifdef KVS_SHIM_ASAN
    __asan_unpoison_memory_region(f->stack, STACK); /* frames that were left, not returned from */
    f->fake = nullptr;
#endif
    prepare(f, entry);
    return f;
}

static void swap(kvs_fiber *from, kvs_fiber *to) {
#ifdef FIBER_ASSEMBLY
    kvs_fiber_swap(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
}

#ifdef KVS_SHIM_ASAN
static void announce(void **fake, const kvs_fiber *to) {
    if (to->stack)
        __sanitizer_start_switch_fiber(fake, to->stack, STACK);
    else
        __sanitizer_start_switch_fiber(fake, to->bottom, to->bytes);
}
void kvs_fiber_arrived(kvs_fiber *self) {
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(self->fake, &bottom, &bytes);
    if (!pool.host.bottom) pool.host.bottom = bottom, pool.host.bytes = bytes; /* the first switch is the host's */
}
#else
static void announce(void **, const kvs_fiber *) {}
void kvs_fiber_arrived(kvs_fiber *) {}
#endif

static void **fake_of(kvs_fiber *f) {
#ifdef KVS_SHIM_ASAN
    return &f->fake;
#else
    (void)f;
    return nullptr;
#endif
}

void kvs_fiber_switch(kvs_fiber *from, kvs_fiber *to) {
    announce(fake_of(from), to);
    swap(from, to);
    kvs_fiber_arrived(from);
}

void kvs_fiber_leave(kvs_fiber *from, kvs_fiber *to) {
    pool.spare.push_back(from); /* not given out before the switch */
    announce(nullptr, to);
    swap(from, to);
    abort();
}
