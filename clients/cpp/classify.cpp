// Classifies image files with an exported TorchScript file, without Python.
//
//     classify MODEL.pt IMAGE [IMAGE ...]
//
// Prints a line of JSON for each image, with the best five labels. Ends with 1 if any could not be classified, with 2
// if the model cannot be used.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <torch/script.h>

#include "images.hpp"
#include "reason.hpp"

using Json = nlohmann::ordered_json;  // keeps the best label first

struct Model {
    torch::jit::Module module;  // forward: uint8 (N, H, W, 3), RGB, to probabilities float32 (N, C)
    std::vector<std::string> labels;
    bool to_srgb;  // whether embedded colour profiles count
};

Model load(const std::string& path) {
    torch::jit::ExtraFilesMap extra{{"spec.json", ""}};
    auto module = torch::jit::load(path, torch::kCPU, extra);
    if (extra["spec.json"].empty()) throw std::invalid_argument("carries no spec.json; export the run again");
    const auto spec = Json::parse(extra["spec.json"]);
    const bool to_srgb = spec.value("colour", "as-stored") == "srgb";  // version 1 of the spec has no `colour`
    return {module, spec.at("labels").get<std::vector<std::string>>(), to_srgb};
}

Bytes read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw ImageError(std::string("cannot be read (") + std::strerror(errno) + ")");
    return {std::istreambuf_iterator<char>(file), {}};
}

// {label: probability}, best first.
Json classify(Model& model, Image image) {
    const auto images = torch::from_blob(image.rgb.data(), {1, image.height, image.width, 3}, torch::kUInt8);
    const auto probabilities = model.module.forward({images}).toTensor()[0];
    const auto count = static_cast<std::int64_t>(model.labels.size());
    TORCH_CHECK(probabilities.numel() == count, "the spec names ", count, " labels for ", probabilities.numel(),
                " outputs; export the run again");
    const auto [values, places] = probabilities.topk(std::min<std::int64_t>(5, count));
    Json predictions = Json::object();
    for (std::int64_t i = 0; i < values.numel(); i++)
        predictions[model.labels[static_cast<std::size_t>(places[i].item<std::int64_t>())]] = values[i].item<float>();
    return predictions;
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: classify MODEL.pt IMAGE [IMAGE ...]\n";
        return 2;
    }
    const c10::InferenceMode no_gradients;
    Model model;
    try {
        model = load(argv[1]);
    } catch (const std::exception& error) {
        std::cerr << "classify: " << argv[1] << ": " << reason(error) << '\n';
        return 2;
    }
    bool all_good = true;
    for (int i = 2; i < argc; i++) {
        Json line{{"image", argv[i]}};
        try {
            line["predictions"] = classify(model, decode(read(argv[i]), model.to_srgb));
        } catch (const std::exception& error) {
            line["error"] = reason(error);
            all_good = false;
        }
        // A path need not be UTF-8, as JSON must be.
        std::cout << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
    }
    return all_good ? 0 : 1;
}
