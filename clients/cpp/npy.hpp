// NumPy's .npy files, as far as `verify` needs them: format 1.0, C order, four dimensions; float32 or uint8 to read,
// float32 to write. For little-endian machines.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/types.h>

struct NpyError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws NpyError for a file that cannot be read or is of another kind.
inline torch::Tensor read_npy(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    const auto fail = [&](const std::string& rule) { throw NpyError(path + ": " + rule); };
    if (!file) fail("cannot be read");
    if (bytes.size() < 10 || bytes.compare(0, 8, std::string("\x93NUMPY\1\0", 8)) != 0)
        fail("not a .npy file of format 1.0");
    const std::size_t length = static_cast<std::uint8_t>(bytes[8]) + 256 * static_cast<std::uint8_t>(bytes[9]);
    const std::string header = bytes.substr(10, length);
    std::smatch type, shape;
    if (!std::regex_search(header, type, std::regex(R"('descr': *'(<f4|\|u1)')")))
        fail("must be float32 ('<f4') or uint8 ('|u1')");
    if (!std::regex_search(header, std::regex("'fortran_order': *False"))) fail("must be in C order");
    const std::regex four_sizes(R"('shape': *\((\d{1,9}), *(\d{1,9}), *(\d{1,9}), *(\d{1,9}),?\))");
    if (!std::regex_search(header, shape, four_sizes)) fail("must have four dimensions");
    std::vector<std::int64_t> sizes;
    for (int i = 1; i <= 4; i++) sizes.push_back(std::stoll(shape[i]));
    const auto tensor = torch::empty(sizes, type[1] == "<f4" ? torch::kFloat32 : torch::kUInt8);
    if (bytes.size() != 10 + length + tensor.nbytes()) fail("is not as long as its header says");
    std::memcpy(tensor.data_ptr(), bytes.data() + 10 + length, tensor.nbytes());
    return tensor;
}

// tensor: float32, on the CPU, of any shape.
inline void write_npy(const std::string& path, const torch::Tensor& tensor) {
    const auto values = tensor.contiguous();
    std::ostringstream header;
    header << "{'descr': '<f4', 'fortran_order': False, 'shape': (";
    for (const auto size : values.sizes()) header << size << ", ";
    header << "), }";
    std::string text = header.str();
    text.resize((10 + text.size() + 64) / 64 * 64 - 11, ' ');  // the data begins at a multiple of 64
    text += '\n';
    std::ofstream file(path, std::ios::binary);
    file.write("\x93NUMPY\1\0", 8);
    file.put(static_cast<char>(text.size() % 256)).put(static_cast<char>(text.size() / 256));
    file << text;
    file.write(static_cast<const char*>(values.data_ptr()), static_cast<std::streamsize>(values.nbytes()));
    if (!file.flush()) throw NpyError(path + ": cannot be written");
}
