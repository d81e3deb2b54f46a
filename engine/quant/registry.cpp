// Every method, one line each.
#include "engine/quant/method.h"

#define METHODS(METHOD) \
  METHOD(rtn)           \
  METHOD(gptq)          \
  METHOD(awq)           \
  METHOD(quip)          \
  METHOD(quipsharp)     \
  METHOD(slimllm)       \
  METHOD(pbllm)         \
  METHOD(billm)

namespace engine {

#define DECLARE(name) std::unique_ptr<Method> make_##name();
METHODS(DECLARE)
#undef DECLARE

namespace {
struct Entry {
  const char* name;
  std::unique_ptr<Method> (*make)();
};
#define ENTRY(name) {#name, make_##name},
constexpr Entry entries[] = {METHODS(ENTRY)};
#undef ENTRY
}  // namespace

std::vector<SiteResult> Method::quantize_group(GroupPass&) {
  REQUIRE(false, std::string(name()) + " quantizes whole blocks");
}

std::vector<SiteResult> Method::quantize_block(BlockPass&) {
  REQUIRE(false, std::string(name()) + " quantizes tap by tap");
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const Entry& e : entries) names.emplace_back(e.name);
  return names;
}

std::unique_ptr<Method> make_method(const std::string& name) {
  std::string known;
  for (const Entry& e : entries) {
    if (name == e.name) return e.make();
    known += known.empty() ? e.name : std::string(", ") + e.name;
  }
  throw Error(ErrorCode::usage, "--method: expected one of " + known + ", found \"" + name + "\"");
}

}  // namespace engine
