// What went wrong, on one line, without the backtraces that LibTorch adds.
#pragma once

#include <exception>
#include <sstream>
#include <string>

#include <c10/util/Exception.h>

inline std::string reason(const std::exception& error) {
    const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
    std::string text = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
    const auto after_traceback = text.rfind("\nRuntimeError: ");  // TorchScript says first where, in many lines
    if (after_traceback != std::string::npos) text = text.substr(after_traceback);
    std::istringstream words(text);
    std::string line, word;
    while (words >> word) line += (line.empty() ? "" : " ") + word;
    return line;
}
