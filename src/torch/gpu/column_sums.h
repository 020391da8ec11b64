// Sums over the rows of a matrix, in a fixed order: what the blocks of another kernel have left.
#pragma once
#include "block.h"

namespace gpu {

template <class A>
struct ColumnSums {
  static constexpr int COLUMNS = 32, SLOTS = 8;
  int64_t rows, columns;
  const A *x;
  A *y;

  int64_t blocks() const { return (columns + COLUMNS - 1) / COLUMNS; }
  static int64_t shared() { return COLUMNS * SLOTS; }

  void operator()(const Block &block) const {
    A *sums = block.shared<A>();
    block.each([&](int thread) {
      int64_t column = block.index() * COLUMNS + thread % COLUMNS;
      A sum = 0;
      if (column < columns)
        for (int64_t row = thread / COLUMNS; row < rows; row += SLOTS) sum += x[row * columns + column];
      sums[thread] = sum;
    });
    sum_slots(block, sums, SLOTS, COLUMNS);
    block.each([&](int thread) {
      int64_t column = block.index() * COLUMNS + thread;
      if (thread < COLUMNS && column < columns) y[column] = sums[thread];
    });
  }
};

}  // namespace gpu
