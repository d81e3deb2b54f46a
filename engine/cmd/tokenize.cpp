// engine tokenize: text to ids, as the evaluation would see it.
#include <cstdio>
#include <iostream>

#include "engine/cmd/commands.h"
#include "engine/quant/calibration.h"
#include "formats/dataset.h"
#include "formats/safetensors.h"

namespace engine {
namespace {

class TokenizeCommand final : public Command {
 public:
  [[nodiscard]] const char* name() const override { return "tokenize"; }
  [[nodiscard]] const char* summary() const override { return "Show the token ids of a text"; }

  void declare(CLI::App& app, const std::vector<std::string>&) override {
    app.add_option("--model", model_,
                   "Checkpoint directory, .qw file, or a tokenizer.json / tokenizer.model file")
        ->required();
    auto* text = app.add_option("--text", text_, "Text file");
    app.add_option("--prompt", prompt_, "The text itself")->excludes(text);
    app.add_option("--dataset", dataset_, "How a text file becomes one string; see engine ppl")
        ->capture_default_str();
    app.add_option("--tokens-out", out_,
                   "Write the ids as I32 [count] to this safetensors file (tensor \"tokens\") "
                   "instead of printing them");
    app.add_flag("--no-bos", no_bos_, "Leave BOS out even if the tokenizer adds it");
    app.add_flag("--plain-prompt", plain_, "Names of special tokens are ordinary text");
    app.add_flag("--pieces", pieces_, "Print each token's text behind its id");
  }

  void run() override {
    if (text_.empty() && prompt_.empty()) {
      throw Error(ErrorCode::usage, "expected --text FILE or --prompt TEXT");
    }
    const std::unique_ptr<Tokenizer> tokenizer = open();
    std::string text = prompt_;
    if (!text_.empty()) {
      const TextCorpus corpus = load_corpus(text_, dataset_from_name(dataset_));
      if (!corpus.documents.empty()) {
        throw Error(ErrorCode::usage, "--dataset: c4-old is a set of documents, not one text");
      }
      text = corpus.text;
    }
    std::vector<std::int32_t> ids =
        tokenizer->encode(text, plain_ ? SpecialText::plain : SpecialText::parse);
    if (tokenizer->adds_bos() && !no_bos_) ids.insert(ids.begin(), tokenizer->bos_id());
    if (!out_.empty()) {
      SafetensorsWriter writer(
          out_, {{"tokens", TensorDType::i32, {static_cast<std::int64_t>(ids.size())}}});
      writer.append("tokens", std::as_bytes(std::span(ids)));
      writer.commit();
    } else {
      for (const std::int32_t id : ids) {
        std::cout << id;
        if (pieces_) std::cout << '\t' << quote_text(tokenizer->token_bytes(id));
        std::cout << '\n';
      }
    }
    std::cout.flush();
    std::fprintf(stderr, "%zu tokens\n", ids.size());
  }

 private:
  [[nodiscard]] std::unique_ptr<Tokenizer> open() const {
    const std::filesystem::path path(model_);
    std::error_code error;
    if (std::filesystem::is_directory(path, error) || path.extension() == ".json" ||
        path.extension() == ".model") {
      return load_tokenizer(path);
    }
    auto tokenizer = model_tokenizer(*open_model(model_));
    if (!tokenizer) throw Error(ErrorCode::usage, model_ + ": this model has no tokenizer");
    return tokenizer;
  }

  std::string model_, text_, prompt_, out_, dataset_ = "plain";
  bool no_bos_ = false, plain_ = false, pieces_ = false;
};

}  // namespace

std::unique_ptr<Command> make_tokenize_command() { return std::make_unique<TokenizeCommand>(); }

}  // namespace engine
