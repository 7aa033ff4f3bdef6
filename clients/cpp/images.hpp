// From a JPEG or PNG file to upright 8-bit RGB, to the pixels that predictor/pillow_preprocessing.py makes of it with Pillow.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

using Bytes = std::vector<std::uint8_t>;

struct Image {
    std::int64_t width = 0, height = 0;  // px
    Bytes rgb;                           // height × width × 3
};

// Bytes that are not an image we can use; the message is one line.
struct ImageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The number of pixels is checked in the header, before anything is decoded. Transparency comes out on white, 16-bit
// and CMYK pixels as 8-bit RGB, the image turned as its EXIF says. An embedded colour profile is converted to sRGB, or
// ignored, as the spec's `colour` says. Throws ImageError.
Image decode(const Bytes& body, bool to_srgb);
