// What a new Linux compiles loads on an old one, with glibc 2.28 and its libstdc++: of the symbols that came
// later, those that are in use are defined here, hidden, by what was there before. `make wheels` says when
// another is needed.
#include <exception>
#include <ios>
#include <new>

#ifdef __GLIBC__
#if __GLIBC_PREREQ(2, 29)
#include <math.h>
#include <pthread.h>

#ifdef __x86_64__
#define PYSPEC_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define PYSPEC_FIRST_GLIBC "GLIBC_2.17"
#endif
#define PYSPEC_FIRST(name) __asm__(".symver first_" #name "," #name "@" PYSPEC_FIRST_GLIBC)
#define PYSPEC_NAMED(symbol) __asm__(symbol) __attribute__((visibility("hidden")))

extern "C" {
PYSPEC_FIRST(exp);
PYSPEC_FIRST(log);
PYSPEC_FIRST(pthread_once);
double first_exp(double x);
double first_log(double x);
int first_pthread_once(pthread_once_t* once, void (*call)());

// The later ones differ in errno alone.
double exp(double x) noexcept { return first_exp(x); }
double log(double x) noexcept { return first_log(x); }
// Moved from libpthread into libc.
int once(pthread_once_t* flag, void (*call)()) PYSPEC_NAMED("pthread_once");
int once(pthread_once_t* flag, void (*call)()) { return first_pthread_once(flag, call); }
// Whether counters of references may do without atomic instructions: never.
char __libc_single_threaded = 0;

// Private members of std::exception_ptr, by its public ones: a copy that is not destroyed is a reference
// more.
void copy_exception(void* made, const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
void add_reference(void* pointer) PYSPEC_NAMED("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void release(void* pointer) PYSPEC_NAMED("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void add_reference(void* pointer) {
  void* made;
  copy_exception(&made, pointer);
}

void release(void* pointer) { destroy_exception(pointer); }

// std::condition_variable::wait, which was there before without a promise that it does not throw.
#define PYSPEC_WAIT "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE"
__asm__(".symver first_wait," PYSPEC_WAIT "@GLIBCXX_3.4.11");
void first_wait(void* condition, void* lock);
void wait(void* condition, void* lock) PYSPEC_NAMED(PYSPEC_WAIT);
void wait(void* condition, void* lock) { first_wait(condition, lock); }

// Streams of strings that are made without an argument, by the constructors that are told what for.
#define PYSPEC_STREAM(name) "_ZNSt7__cxx11" name "IcSt11char_traitsIcESaIcEEC1E"
void make_stream(void* made, std::ios_base::openmode mode) __asm__(
    PYSPEC_STREAM("18basic_stringstream") "St13_Ios_Openmode");
void make_output(void* made, std::ios_base::openmode mode) __asm__(
    PYSPEC_STREAM("19basic_ostringstream") "St13_Ios_Openmode");
void make_default_stream(void* made) PYSPEC_NAMED(PYSPEC_STREAM("18basic_stringstream") "v");
void make_default_stream(void* made) { make_stream(made, std::ios_base::in | std::ios_base::out); }
void make_default_output(void* made) PYSPEC_NAMED(PYSPEC_STREAM("19basic_ostringstream") "v");
void make_default_output(void* made) { make_output(made, std::ios_base::out); }

void throw_bad_array_new_length() PYSPEC_NAMED("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}
#endif
#endif
