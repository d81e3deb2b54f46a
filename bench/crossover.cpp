#include "bench/crossover.h"

#include "bench/common.h"
#include "bench/kernel_cases.h"
#include "engine/core/interrupt.h"
#include "engine/core/progress.h"

namespace engine {
namespace {

constexpr std::int64_t all_rows[] = {1,  2,  4,   8,   16,  17,  24,  32,   48,
                                     64, 96, 128, 192, 256, 384, 512, 1024, 2048};

struct Kernel {
  const char* name;
  PackedKernel kernel;
};
constexpr Kernel kernels[] = {{"vector", PackedKernel::vector},
                              {"matrix", PackedKernel::matrix},
                              {"expand", PackedKernel::expand}};

double microseconds(Workbench& bench, const WeightSpec& spec, std::int64_t m, DType dtype,
                    PackedKernel kernel, int repeat) {
  const Prepared p = prepare_linear(bench, spec, m, dtype, kernel);
  const double ms = spread_of(time_launches(bench.ops(), p.work, repeat)).median;
  bench.ops().synchronize();
  bench.clear();
  return 1e3 * ms;
}

}  // namespace

Json measure_crossover(Ops& ops, Ledger& ledger, const std::vector<std::string>& models,
                       const std::regex& filter, int repeat, std::int64_t max_rows) {
  const DType dtype = usual_dtype(ops);
  std::vector<std::pair<std::string, WeightSpec>> wanted;
  for (const std::string& model : models) {
    for (const LinearShape& shape : linear_shapes(model, false)) {
      for (const int bits : {2, 3, 4, 5, 6, 8}) {
        WeightSpec spec;
        spec.shape.rows = shape.rows;
        spec.shape.cols = shape.cols;
        spec.shape.bits = bits;
        const std::string name = shape.name + "/" + spec.name();
        if (std::regex_search(name, filter)) wanted.emplace_back(name, spec);
      }
    }
  }
  if (wanted.empty()) throw Error(ErrorCode::usage, "--filter: no shape matches");
  Workbench bench(ops, ledger);
  Json rows = Json::array();
  Progress progress("crossover", static_cast<std::int64_t>(wanted.size()));
  for (const auto& [name, spec] : wanted) {
    for (const std::int64_t m : all_rows) {
      if (m > max_rows) break;
      check_interrupt();
      Json row;
      row["weight"] = name;
      row["rows"] = m;
      const char* winner = nullptr;
      double best = 0;
      for (const Kernel& k : kernels) {
        const double us = microseconds(bench, spec, m, dtype, k.kernel, repeat);
        row[std::string(k.name) + "_us"] = us;
        if (winner == nullptr || us < best) {
          winner = k.name;
          best = us;
        }
      }
      const double chosen = microseconds(bench, spec, m, dtype, PackedKernel::automatic, repeat);
      row["automatic_us"] = chosen;
      row["winner"] = winner;
      row["automatic_over_winner"] = chosen / best;
      rows.push_back(row);
    }
    progress.advance(1, name);
  }
  return rows;
}

std::string crossover_tables(const Json& rows) {
  std::string out, last;
  std::vector<std::vector<std::string>> cells;
  const auto flush = [&] {
    if (!cells.empty()) out += last + "\n\n" + markdown_table(cells) + "\n";
    cells.clear();
  };
  for (const Json& row : rows) {
    const auto name = row.at("weight").get<std::string>();
    if (name != last) {
      flush();
      last = name;
      cells.push_back({"rows", "vector us", "matrix us", "expand us", "automatic us", "winner"});
    }
    std::vector<std::string> line = {std::to_string(row.at("rows").get<std::int64_t>())};
    for (const char* key : {"vector_us", "matrix_us", "expand_us", "automatic_us"}) {
      line.push_back(fixed(row.at(key).get<double>(), 2));
    }
    line.push_back(row.at("winner").get<std::string>());
    cells.push_back(line);
  }
  flush();
  return out;
}

}  // namespace engine
