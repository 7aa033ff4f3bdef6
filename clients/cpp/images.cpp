#include "images.hpp"

#include <csetjmp>
#include <cstddef>
#include <cstdio>  // jpeglib.h needs it and does not include it
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include <jpeglib.h>

#include <jerror.h>
#include <lcms2.h>
#include <png.h>

namespace {

constexpr std::int64_t MAX_PIXELS = 50'000'000;  // 150 MB as RGB; as in predictor/pillow_preprocessing.py
constexpr std::size_t MAX_PROFILE = 4 << 20;     // bytes; as in predictor/colour_profiles.py

// Both libraries report errors with longjmp, which runs no destructors. So whatever owns memory lies in a reader on the
// heap, and the functions that a jump leaves, `read_jpeg` and `read_png`, own nothing.

struct JpegReader {
    jpeg_decompress_struct info{};
    jpeg_error_mgr errors{};
    std::jmp_buf on_error{};
    char message[JMSG_LENGTH_MAX] = "";
    Image image;
    int orientation = 1;
    JOCTET* profile = nullptr;
    unsigned profile_size = 0;

    JpegReader() = default;
    JpegReader(const JpegReader&) = delete;
    ~JpegReader() {
        jpeg_destroy_decompress(&info);
        std::free(profile);
    }
};

struct PngReader {
    png_structp png = nullptr;
    png_infop info = nullptr;
    const Bytes& body;
    std::size_t position = 0;
    std::string message;
    Image image;
    std::vector<png_bytep> rows;
    int orientation = 1;
    bool is_grey = false;
    png_bytep profile = nullptr;  // owned by `info`
    png_uint_32 profile_size = 0;

    explicit PngReader(const Bytes& bytes) : body(bytes) {}
    PngReader(const PngReader&) = delete;
    ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }
};

void check_size(std::int64_t width, std::int64_t height) {
    if (width * height > MAX_PIXELS)
        throw ImageError(std::to_string(width) + "×" + std::to_string(height) +
                           " px is too large: at most 50,000,000 pixels are accepted; give a smaller image");
}

// a × b / 255, rounded. There are no ties, as 255 is odd.
int scaled(int a, int b) { return (a * b + 127) / 255; }

// The orientation, 1 to 8, that a block of EXIF names; 1 where it names none.
int exif_orientation(const std::uint8_t* exif, std::size_t size) {
    const bool little = size >= 2 && exif[0] == 'I';
    const auto number = [&](std::size_t at, std::size_t bytes) {  // 0 where it would lie beyond the end
        std::size_t value = 0;
        if (at + bytes > size) return value;
        for (std::size_t i = 0; i < bytes; i++) value = value << 8 | exif[at + (little ? bytes - 1 - i : i)];
        return value;
    };
    if (number(2, 2) != 42) return 1;
    const std::size_t directory = number(4, 4), entries = number(directory, 2);
    for (std::size_t i = 0; i < entries; i++) {
        const std::size_t entry = directory + 2 + 12 * i;
        if (number(entry, 2) != 0x0112) continue;  // the tag Orientation
        const std::size_t value = number(entry + 8, number(entry + 2, 2) == 4 ? 4 : 2);  // of type LONG, or SHORT
        return 1 <= value && value <= 8 ? static_cast<int>(value) : 1;
    }
    return 1;
}

// The image turned and mirrored as the EXIF orientation says: 2, 4, 5 and 7 mirror, 5 to 8 swap the sides.
Image upright(Image image, int orientation) {
    if (orientation == 1) return image;
    const bool swaps = orientation >= 5;
    const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    const std::int64_t width = swaps ? image.height : image.width, height = swaps ? image.width : image.height;
    Image turned{width, height, Bytes(image.rgb.size())};
    std::uint8_t* to = turned.rgb.data();
    for (std::int64_t y = 0; y < height; y++)
        for (std::int64_t x = 0; x < width; x++, to += 3) {
            const std::int64_t column = swaps ? y : x, row = swaps ? x : y;
            const std::int64_t from_x = from_right ? image.width - 1 - column : column;
            const std::int64_t from_y = from_below ? image.height - 1 - row : row;
            std::memcpy(to, &image.rgb[3 * (from_y * image.width + from_x)], 3);
        }
    return turned;
}

// Four bytes a pixel to three, in place: what is written never overtakes what is still to be read.
template <class Convert>
void four_to_three(Bytes& pixels, Convert convert) {
    const std::size_t count = pixels.size() / 4;
    for (std::size_t i = 0; i < count; i++) {
        const int fourth = pixels[4 * i + 3];
        for (std::size_t c = 0; c < 3; c++)
            pixels[3 * i + c] = static_cast<std::uint8_t>(convert(pixels[4 * i + c], fourth));
    }
    pixels.resize(3 * count);
}

// Converts pixels from a profile's colours to sRGB in place, perceptual, as predictor/colour_profiles.py does. Each pixel
// has `width` bytes: it starts as grey, RGB or CMYK and becomes RGB; what follows stays. A profile that is damaged, too
// large or of another kind than the pixels is ignored. Returns whether it was used.
bool converted(Bytes& pixels, cmsUInt32Number width, cmsColorSpaceSignature kind, const void* profile,
               std::size_t size) {
    using Owned = std::unique_ptr<void, decltype(&cmsCloseProfile)>;
    if (profile == nullptr || size > MAX_PROFILE) return false;
    const Owned source(cmsOpenProfileFromMem(profile, static_cast<cmsUInt32Number>(size)), cmsCloseProfile);
    if (!source || cmsGetColorSpace(source.get()) != kind) return false;
    const Owned target(cmsCreate_sRGBProfile(), cmsCloseProfile);
    const cmsUInt32Number count = cmsChannelsOf(kind), space = static_cast<cmsUInt32Number>(_cmsLCMScolorSpace(kind));
    const cmsUInt32Number ink = kind == cmsSigCmykData ? FLAVOR_SH(1) : 0;  // each byte is what the ink leaves white
    const cmsUInt32Number from = COLORSPACE_SH(space) | CHANNELS_SH(count) | EXTRA_SH(width - count) | BYTES_SH(1) | ink;
    const cmsUInt32Number to = COLORSPACE_SH(PT_RGB) | CHANNELS_SH(3) | EXTRA_SH(width - 3) | BYTES_SH(1);
    const std::unique_ptr<void, decltype(&cmsDeleteTransform)> transform(
        cmsCreateTransform(source.get(), from, target.get(), to, INTENT_PERCEPTUAL, 0), cmsDeleteTransform);
    if (!transform) return false;
    cmsDoTransform(transform.get(), pixels.data(), pixels.data(), static_cast<cmsUInt32Number>(pixels.size() / width));
    return true;
}

[[noreturn]] void jpeg_failed(j_common_ptr info) {
    auto* reader = static_cast<JpegReader*>(info->client_data);
    info->err->format_message(info, reader->message);
    std::longjmp(reader->on_error, 1);
}

// libjpeg mends what is damaged and warns. Of that only an early end is an error here: the rest would be grey.
void jpeg_warned(j_common_ptr info, int level) {
    if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) jpeg_failed(info);
}

void read_jpeg(JpegReader& reader, const Bytes& body) {
    auto& info = reader.info;
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, body.data(), body.size());
    jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
    jpeg_save_markers(&info, JPEG_APP0 + 2, 0xFFFF);
    jpeg_read_header(&info, TRUE);
    check_size(info.image_width, info.image_height);
    for (auto* marker = info.marker_list; marker != nullptr && reader.orientation == 1; marker = marker->next)
        if (marker->data_length > 6 && std::memcmp(marker->data, "Exif\0\0", 6) == 0)
            reader.orientation = exif_orientation(marker->data + 6, marker->data_length - 6);
    jpeg_read_icc_profile(&info, &reader.profile, &reader.profile_size);
    info.out_color_space = info.num_components == 4 ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&info);
    const std::size_t stride = std::size_t{info.output_width} * static_cast<std::size_t>(info.output_components);
    reader.image.width = info.output_width;
    reader.image.height = info.output_height;
    reader.image.rgb.resize(stride * info.output_height);
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = reader.image.rgb.data() + stride * info.output_scanline;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
}

Image decode_jpeg(const Bytes& body, bool to_srgb) {
    const auto reader = std::make_unique<JpegReader>();
    reader->info.client_data = reader.get();
    reader->info.err = jpeg_std_error(&reader->errors);
    reader->errors.error_exit = jpeg_failed;
    reader->errors.emit_message = jpeg_warned;
    if (setjmp(reader->on_error) != 0)
        throw ImageError(std::string("the JPEG image is truncated or damaged (") + reader->message + ")");
    read_jpeg(*reader, body);
    Bytes& pixels = reader->image.rgb;
    const int channels = reader->info.num_components;
    const auto kind = channels == 1 ? cmsSigGrayData : channels == 3 ? cmsSigRgbData : cmsSigCmykData;
    const cmsUInt32Number width = channels == 4 ? 4 : 3;
    const bool is_rgb = to_srgb && converted(pixels, width, kind, reader->profile, reader->profile_size);
    if (channels == 4)  // CMYK, inverted as Adobe writes it: each byte is what the ink leaves white
        four_to_three(pixels, [is_rgb](int paper, int black) { return is_rgb ? paper : scaled(paper, black); });
    return upright(std::move(reader->image), reader->orientation);
}

[[noreturn]] void png_failed(png_structp png, png_const_charp message) {
    static_cast<PngReader*>(png_get_error_ptr(png))->message = message;
    png_longjmp(png, 1);
}

void png_warned(png_structp, png_const_charp) {}

void next_bytes(png_structp png, png_bytep target, png_size_t count) {
    auto* reader = static_cast<PngReader*>(png_get_io_ptr(png));
    if (count > reader->body.size() - reader->position) png_error(png, "it ends too soon");
    std::memcpy(target, reader->body.data() + reader->position, count);
    reader->position += count;
}

void read_png(PngReader& reader) {
    const auto png = reader.png;
    png_set_read_fn(png, &reader, next_bytes);
    png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // ours is on the number of pixels
    png_read_info(png, reader.info);
    const std::size_t width = png_get_image_width(png, reader.info), height = png_get_image_height(png, reader.info);
    check_size(static_cast<std::int64_t>(width), static_cast<std::int64_t>(height));
    png_bytep exif = nullptr;
    png_uint_32 exif_size = 0;
    if (png_get_eXIf_1(png, reader.info, &exif_size, &exif) != 0)
        reader.orientation = exif_orientation(exif, exif_size);
    png_charp name = nullptr;
    int compression = 0;
    png_get_iCCP(png, reader.info, &name, &compression, &reader.profile, &reader.profile_size);
    reader.is_grey = (png_get_color_type(png, reader.info) & PNG_COLOR_MASK_COLOR) == 0;

    // To RGBA, with Pillow's way of leaving out the low byte; but 16-bit grey as predictor/pillow_preprocessing.py rounds it.
    const bool is_opaque_grey = png_get_color_type(png, reader.info) == PNG_COLOR_TYPE_GRAY;
    if (is_opaque_grey && png_get_bit_depth(png, reader.info) == 16) {
        png_set_scale_16(png);
    } else {
        png_set_expand(png);
        png_set_strip_16(png);
    }
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 255, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, reader.info);

    reader.image.width = static_cast<std::int64_t>(width);
    reader.image.height = static_cast<std::int64_t>(height);
    reader.image.rgb.resize(4 * width * height);
    for (std::size_t y = 0; y < height; y++) reader.rows.push_back(reader.image.rgb.data() + 4 * width * y);
    png_read_image(png, reader.rows.data());
}

Image decode_png(const Bytes& body, bool to_srgb) {
    const auto reader = std::make_unique<PngReader>(body);
    reader->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, reader.get(), png_failed, png_warned);
    reader->info = reader->png == nullptr ? nullptr : png_create_info_struct(reader->png);
    if (reader->info == nullptr) throw std::bad_alloc();
    if (setjmp(png_jmpbuf(reader->png)) != 0)
        throw ImageError("the PNG image is truncated or damaged (" + reader->message + ")");
    read_png(*reader);
    const auto kind = reader->is_grey ? cmsSigGrayData : cmsSigRgbData;
    if (to_srgb) converted(reader->image.rgb, 4, kind, reader->profile, reader->profile_size);
    four_to_three(reader->image.rgb, [](int colour, int alpha) { return scaled(colour, alpha) + 255 - alpha; });
    return upright(std::move(reader->image), reader->orientation);
}

bool starts_with(const Bytes& body, const std::string& start) {
    return body.size() >= start.size() && std::memcmp(body.data(), start.data(), start.size()) == 0;
}

}  // namespace

Image decode(const Bytes& body, bool to_srgb) {
    if (body.empty()) throw ImageError("the file is empty; give an image");
    if (starts_with(body, "\xff\xd8\xff")) return decode_jpeg(body, to_srgb);
    if (starts_with(body, "\x89PNG")) return decode_png(body, to_srgb);
    throw ImageError("the file is neither JPEG nor PNG, which are the kinds that this program reads");
}
