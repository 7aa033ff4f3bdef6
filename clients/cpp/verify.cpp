// Runs one graph of an exported TorchScript file on prepared batches, for the comparison with PyTorch.
//
//     verify MODEL.pt GRAPH IN_DIR OUT_DIR        GRAPH is network, crops or pixels
//
// Reads every IN_DIR/NAME.npy in the order of their names, each one batch, and writes OUT_DIR/NAME.npy. The last line
// printed is {"version": LibTorch's, "seconds": spent in the graph's calls}; the first batch is run once more before,
// untimed. Ends with 2 for a wrong call or wrong input, with 4 and LibTorch's own reason if the graph cannot be run.

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include <torch/script.h>
#include <torch/version.h>

#include "npy.hpp"
#include "reason.hpp"

namespace fs = std::filesystem;

std::vector<fs::path> batches_of(const fs::path& folder) {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(folder))
        if (entry.path().extension() == ".npy") paths.push_back(entry.path());
    if (paths.empty()) throw NpyError(folder.string() + ": holds no .npy files");
    std::sort(paths.begin(), paths.end());
    return paths;
}

torch::jit::Method load(const std::string& path, const std::string& graph) {
    const auto module = torch::jit::load(path, torch::kCPU);
    if (graph == "network") return module.attr("network").toModule().get_method("forward");
    return module.get_method(graph == "crops" ? "classify_crops" : "forward");
}

// Returns the seconds spent in the graph's calls.
double run(const torch::jit::Method& graph, const fs::path& in, const fs::path& out) {
    const auto paths = batches_of(in);
    fs::create_directories(out);
    graph({read_npy(paths.front())});
    std::chrono::duration<double> spent{0};
    for (const auto& path : paths) {
        const auto batch = read_npy(path);
        const auto start = std::chrono::steady_clock::now();
        const auto output = graph({batch}).toTensor();
        spent += std::chrono::steady_clock::now() - start;
        write_npy(out / path.filename(), output);
    }
    return spent.count();
}

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc), graphs{"network", "crops", "pixels"};
    if (arguments.size() != 4 || std::find(graphs.begin(), graphs.end(), arguments[1]) == graphs.end()) {
        std::cerr << "usage: verify MODEL.pt network|crops|pixels IN_DIR OUT_DIR\n";
        return 2;
    }
    const c10::InferenceMode no_gradients;
    try {
        const double seconds = run(load(arguments[0], arguments[1]), arguments[2], arguments[3]);
        std::cout << R"({"version": ")" << TORCH_VERSION << R"(", "seconds": )" << seconds << "}\n";
        return 0;
    } catch (const NpyError& error) {
        std::cerr << "verify: " << reason(error) << '\n';
        return 2;
    } catch (const fs::filesystem_error& error) {
        std::cerr << "verify: " << reason(error) << '\n';
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "verify: " << arguments[0] << ": " << reason(error) << '\n';
        return 4;
    }
}
