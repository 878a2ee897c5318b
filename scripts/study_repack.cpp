// Does it pay to repack experts as they are read? What ggml's own repacking of one expert takes, and what its kernels then save.
//
//   V=.../vendor/llama.cpp/ggml; L=.venv/lib/python3*/site-packages/llama_cpp/lib      (V: unpacked llama-cpp-python of patches/)
//   c++ -O2 -std=c++17 -I$V/include scripts/study_repack.cpp -o study -L$L -lggml -lggml-base -lggml-cpu -Wl,-rpath,$L
//   ./study WIDTH FFN THREADS        2048 768 2: an expert of Qwen3-30B-A3B in Q4_0
//
// 64 experts, so that those of a token are not in the processor's caches, 8 of them drawn at random for each token.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

ggml_backend_buffer_type_t ggml_backend_cpu_repack_buffer_type(void); // exported, declared in a private header

static const int N_EXPERT = 64, N_USED = 8, N_TOKENS = 400;

static double seconds(std::chrono::steady_clock::time_point since) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

struct Times {
    double repack, matmul; // of one expert, of one token
};

static Times measure(ggml_backend_t backend, ggml_backend_buffer_type_t type, int64_t n_in, int64_t n_out, bool shared_input) {
    const ggml_init_params params{16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true};
    ggml_context *         held = ggml_init(params);
    ggml_tensor *          w    = ggml_new_tensor_3d(held, GGML_TYPE_Q4_0, n_in, n_out, N_EXPERT);
    ggml_backend_buffer_t  one  = ggml_backend_alloc_ctx_tensors_from_buft(held, type);

    std::mt19937         random(0);
    std::vector<uint8_t> bytes(ggml_nbytes(w));
    for (auto & b : bytes) b = uint8_t(random());
    const uint16_t scale = 0x2000; // a small half, so that sums stay finite
    for (size_t i = 0; i < bytes.size(); i += ggml_type_size(GGML_TYPE_Q4_0)) std::memcpy(&bytes[i], &scale, sizeof(scale));
    ggml_backend_tensor_set(w, bytes.data(), 0, bytes.size()); // faults the memory in
    auto start = std::chrono::steady_clock::now();
    ggml_backend_tensor_set(w, bytes.data(), 0, bytes.size());
    Times t{seconds(start) / N_EXPERT, 0.0};

    ggml_context *        graph_context = ggml_init(params);
    ggml_tensor *         x     = ggml_new_tensor_3d(graph_context, GGML_TYPE_F32, n_in, shared_input ? 1 : N_USED, 1);
    ggml_tensor *         ids   = ggml_new_tensor_2d(graph_context, GGML_TYPE_I32, N_USED, 1);
    ggml_cgraph *         graph = ggml_new_graph(graph_context);
    ggml_build_forward_expand(graph, ggml_mul_mat_id(graph_context, w, x, ids));
    ggml_backend_buffer_t two = ggml_backend_alloc_ctx_tensors_from_buft(graph_context, ggml_backend_cpu_buffer_type());
    const std::vector<float> state(size_t(ggml_nelements(x)), 0.1f);
    ggml_backend_tensor_set(x, state.data(), 0, ggml_nbytes(x));
    std::vector<int32_t> order(N_EXPERT);
    std::iota(order.begin(), order.end(), 0);
    for (int i = 0; i < N_TOKENS; i++) {
        std::shuffle(order.begin(), order.end(), random);
        ggml_backend_tensor_set(ids, order.data(), 0, ggml_nbytes(ids));
        start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        t.matmul += seconds(start) / N_TOKENS;
    }
    ggml_backend_buffer_free(two);
    ggml_backend_buffer_free(one);
    ggml_free(graph_context);
    ggml_free(held);
    return t;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "study_repack WIDTH FFN THREADS\n");
        return 2;
    }
    const int64_t  width = std::atoll(argv[1]), ffn = std::atoll(argv[2]);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, std::atoi(argv[3]));
    const auto layer = [&](ggml_backend_buffer_type_t type) { // gate and up, then down
        const Times in = measure(backend, type, width, ffn, true), out = measure(backend, type, ffn, width, false);
        return Times{2 * in.repack + out.repack, 2 * in.matmul + out.matmul};
    };
    const Times plain = layer(ggml_backend_cpu_buffer_type()), packed = layer(ggml_backend_cpu_repack_buffer_type());
    std::printf("an expert is repacked in %.3f ms (copied in %.3f) by one thread; %d experts of a layer, %s threads: %.3f ms plain, "
                "%.3f ms repacked\n",
                1e3 * packed.repack, 1e3 * plain.repack, N_USED, argv[3], 1e3 * plain.matmul, 1e3 * packed.matmul);
    ggml_backend_free(backend);
}
