// Sums over the rows of a matrix, in a fixed order: what the blocks of another kernel have left. Each `width` sums have so many
// zeros before and behind them.
#pragma once
#include "block.h"

namespace gpu {

template <class A>
struct ColumnSums {
  static constexpr int COLUMNS = 32, SLOTS = 8;
  int64_t rows, columns, width, zeros;
  const A *x;
  A *y;

  int64_t spread() const { return width + 2 * zeros; }
  int64_t numbers() const { return columns / width * spread(); }
  int64_t blocks() const { return (numbers() + COLUMNS - 1) / COLUMNS; }
  static int64_t shared() { return COLUMNS * SLOTS; }

  void operator()(const Block &block) const {
    A *sums = block.shared<A>();
    block.each([&](int thread) {
      int64_t number = block.index() * COLUMNS + thread % COLUMNS, at = number % spread() - zeros;
      A sum = 0;
      if (number < numbers() && at >= 0 && at < width)
        for (int64_t row = thread / COLUMNS; row < rows; row += SLOTS) sum += x[row * columns + number / spread() * width + at];
      sums[thread] = sum;
    });
    sum_slots(block, sums, SLOTS, COLUMNS);
    block.each([&](int thread) {
      int64_t number = block.index() * COLUMNS + thread;
      if (thread < COLUMNS && number < numbers()) y[number] = sums[thread];
    });
  }
};

}  // namespace gpu
