// Scratch memory that begins on a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kvevict {

constexpr std::align_val_t LINE_ALIGNMENT{64};

struct AlignedDelete {
  void operator()(void* data) const { ::operator delete[](data, LINE_ALIGNMENT); }
};
template <typename Element>
using Buffer = std::unique_ptr<Element[], AlignedDelete>;

// Room for `count` numbers, or null where there is no such memory.
template <typename Element>
Buffer<Element> allocate(int64_t count) {
  void* data = ::operator new[](static_cast<size_t>(count) * sizeof(Element), LINE_ALIGNMENT, std::nothrow);
  return Buffer<Element>(static_cast<Element*>(data));
}

}  // namespace kvevict
