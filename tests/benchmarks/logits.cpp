// Evaluates token ids with llama.cpp, for tests/benchmarks/llama_cpp.py: logits MODEL ROWS OUT THREADS
//
// A line of ROWS is `FIRST NEW ID...`. With NEW 0, the row's logits [tokens - FIRST, vocabulary] are appended to OUT in
// fp32. Otherwise NEW tokens, each with the largest logit, are printed in a line, fewer if an end token comes before.

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

static void decode(llama_context * context, const std::vector<llama_token> & ids, size_t from, size_t wanted) {
    llama_batch batch = llama_batch_init(int32_t(ids.size()), 0, 1);
    for (size_t at = from; at < ids.size(); at++) {
        const int32_t index = batch.n_tokens++;
        batch.token[index] = ids[at];
        batch.pos[index] = llama_pos(at);
        batch.n_seq_id[index] = 1;
        batch.seq_id[index][0] = 0;
        batch.logits[index] = at >= wanted;
    }
    const int32_t failed = llama_decode(context, batch);
    llama_batch_free(batch);
    if (failed) {
        throw std::runtime_error("llama_decode failed");
    }
}

int main(int count, char ** arguments) {
    if (count != 5) {
        std::cerr << "usage: logits MODEL ROWS OUT THREADS\n";
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model_params model_options = llama_model_default_params();
    model_options.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(arguments[1], model_options);
    if (!model) {
        std::cerr << "the model cannot be loaded\n";
        return 1;
    }
    llama_context_params options = llama_context_default_params();
    options.n_ctx = options.n_batch = options.n_ubatch = 2048;
    options.n_threads = options.n_threads_batch = std::stoi(arguments[4]);
    llama_context * context = llama_init_from_model(model, options);
    const llama_vocab * vocabulary = llama_model_get_vocab(model);
    const int32_t size = llama_vocab_n_tokens(vocabulary);

    std::ifstream rows(arguments[2]);
    std::ofstream out(arguments[3], std::ios::binary);
    for (std::string line; std::getline(rows, line);) {
        std::istringstream numbers(line);
        size_t first = 0, left = 0;
        numbers >> first >> left;
        std::vector<llama_token> ids;
        for (llama_token id; numbers >> id;) {
            ids.push_back(id);
        }
        llama_memory_clear(llama_get_memory(context), true);
        if (left == 0) {
            decode(context, ids, 0, first);
            for (size_t at = first; at < ids.size(); at++) {
                const float * logits = llama_get_logits_ith(context, int32_t(at));
                out.write(reinterpret_cast<const char *>(logits), std::streamsize(sizeof(float)) * size);
            }
            continue;
        }
        for (size_t from = 0; left > 0; left--) {
            decode(context, ids, from, ids.size() - 1);
            const float * logits = llama_get_logits_ith(context, -1);
            const llama_token next = llama_token(std::max_element(logits, logits + size) - logits);
            if (llama_vocab_is_eog(vocabulary, next)) {
                break;
            }
            from = ids.size();
            ids.push_back(next);
            std::cout << next << ' ';
        }
        std::cout << '\n';
    }
    llama_free(context);
    llama_model_free(model);
    return out.good() ? 0 : 1;
}
