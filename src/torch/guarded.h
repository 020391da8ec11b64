// What the C++ files share: errors as text.
#pragma once
#include <c10/util/Exception.h>

#include <cstring>

namespace {

// nullptr, or the text of what `body` threw, which the caller frees with `free`.
template <typename F>
char *guarded(F body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception without a text");
  }
}

}  // namespace
