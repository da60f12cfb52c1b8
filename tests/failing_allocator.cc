// Memory that runs out when a test says so: in place of `new` within one library alone.
//
// Linked with -Bsymbolic, so that the library calls these and nobody else does.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int64_t> left{-1};  // allocations until they fail; below 0 they never do

void* get(std::size_t size, std::size_t alignment) {
  if (left.load() >= 0 && left.fetch_sub(1) <= 0) {
    left.store(0);
    throw std::bad_alloc();
  }
  const std::size_t whole = (size + alignment) / alignment * alignment;
  void* found = std::aligned_alloc(alignment, whole);
  if (found == nullptr) throw std::bad_alloc();
  return found;
}

}  // namespace

void* operator new(std::size_t size) { return get(size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return get(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* a) noexcept { std::free(a); }
void operator delete(void* a, std::size_t) noexcept { std::free(a); }
void operator delete(void* a, std::align_val_t) noexcept { std::free(a); }
void operator delete(void* a, std::size_t, std::align_val_t) noexcept { std::free(a); }

extern "C" __attribute__((visibility("default"))) void kashin_fail_after(int64_t count) {
  left.store(count);
}
