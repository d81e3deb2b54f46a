#include "eval/score_plan.h"

#include <algorithm>
#include <numeric>

#include "engine/core/error.h"

namespace engine {
namespace {

using Tokens = std::span<const std::int32_t>;

// What the model reads: all but the last token.
Tokens input_of(const ScoreRequest& r) { return Tokens(r.tokens).first(r.tokens.size() - 1); }

std::int64_t size_of(Tokens t) { return static_cast<std::int64_t>(t.size()); }

std::int64_t common_prefix(Tokens a, Tokens b) {
  const auto end = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return end.first - a.begin();
}

// A shared piece becomes a segment of its own if it saves at least this share of the tokens below.
constexpr std::int64_t least_saving = 64;

// Builds the segments in depth-first order from the sorted inputs.
class Builder {
 public:
  Builder(std::span<const ScoreRequest> requests, std::span<const std::int64_t> order, bool share)
      : requests_(requests), share_(share) {
    for (const std::int64_t r : order) {
      const Tokens own = input(r);
      if (inputs_.empty() || !std::ranges::equal(own, input(inputs_.back()))) {
        inputs_.push_back(r);
        before_.push_back(before_.empty() ? 0 : total_);
        total_ += size_of(own);
      }
    }
    before_.push_back(total_);
  }

  std::vector<Segment> run() {
    const auto n = static_cast<std::int64_t>(inputs_.size());
    if (!share_) {
      for (std::int64_t i = 0; i < n; ++i) add(-1, i, 0, size_of(input(at(i))));
      return std::move(segments_);
    }
    // Depth first: the last node pushed is taken next.
    std::vector<Node> open = {{0, n, 0, 0, -1}};
    while (!open.empty()) {
      const Node node = open.back();
      open.pop_back();
      expand(node, open);
    }
    return std::move(segments_);
  }

 private:
  // The inputs [first, last) agree in their first `from` tokens, which `parent` and those above it
  // hold.
  struct Node {
    std::int64_t first, last, from, level, parent;
  };

  [[nodiscard]] std::int64_t at(std::int64_t i) const {
    return inputs_[static_cast<std::size_t>(i)];
  }
  [[nodiscard]] Tokens input(std::int64_t request) const {
    return input_of(requests_[static_cast<std::size_t>(request)]);
  }

  std::int64_t add(std::int64_t parent, std::int64_t i, std::int64_t from, std::int64_t to) {
    segments_.push_back({parent, at(i), from, to - from, 0});
    return static_cast<std::int64_t>(segments_.size()) - 1;
  }

  void expand(const Node& node, std::vector<Node>& open) {
    const std::int64_t count = node.last - node.first;
    const Tokens low = input(at(node.first));
    if (count == 1 || node.level + 1 == run_spans) {
      // No room below for children: each input has the rest for itself.
      for (std::int64_t i = node.first; i < node.last; ++i) {
        add(node.parent, i, node.from, size_of(input(at(i))));
      }
      return;
    }
    // Sorted, so what the first and the last share is shared by all.
    const std::int64_t to = common_prefix(low, input(at(node.last - 1)));
    // An input that ends at `to` is there by itself; the others go by their next token.
    std::vector<std::int64_t> starts;
    for (std::int64_t i = node.first; i < node.last; ++i) {
      const Tokens t = input(at(i));
      if (size_of(t) == to) continue;
      const auto next = static_cast<std::size_t>(to);
      if (starts.empty() || t[next] != input(at(i - 1))[next]) starts.push_back(i);
    }
    const bool ends = size_of(low) == to;
    const std::int64_t branches = static_cast<std::int64_t>(starts.size()) + (ends ? 1 : 0);
    const std::int64_t tokens = before_[static_cast<std::size_t>(node.last)] -
                                before_[static_cast<std::size_t>(node.first)] - count * node.from;
    const bool worth = to > node.from && (to - node.from) * (branches - 1) * least_saving >= tokens;
    std::int64_t parent = node.parent, from = node.from, level = node.level;
    if (worth) {
      parent = add(node.parent, node.first, node.from, to);
      from = to;
      ++level;
    } else if (ends) {
      add(node.parent, node.first, node.from, to);
    }
    for (std::size_t s = starts.size(); s-- > 0;) {
      const std::int64_t last = s + 1 < starts.size() ? starts[s + 1] : node.last;
      open.push_back({starts[s], last, from, level, parent});
    }
  }

  std::span<const ScoreRequest> requests_;
  bool share_;
  std::vector<std::int64_t> inputs_;  // requests with distinct inputs, sorted
  std::vector<std::int64_t> before_;  // tokens of the inputs before each
  std::int64_t total_ = 0;
  std::vector<Segment> segments_;
};

// The chain from the first segment to `s` itself.
std::vector<std::int64_t> chain_of(const ScorePlan& plan, std::int64_t s) {
  std::vector<std::int64_t> chain;
  for (; s >= 0; s = plan.segments[static_cast<std::size_t>(s)].parent) chain.push_back(s);
  std::reverse(chain.begin(), chain.end());
  return chain;
}

// Where the targets of every request are: its tokens are found by walking down the segments that
// hold its input.
void place_targets(ScorePlan& plan, std::span<const ScoreRequest> requests,
                   std::span<const std::int64_t> order) {
  // The deepest segment that ends each distinct input.
  std::vector<std::int64_t> leaf(requests.size(), -1);
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& g = plan.segments[s];
    const auto length =
        static_cast<std::int64_t>(input_of(requests[static_cast<std::size_t>(g.request)]).size());
    if (g.position + g.rows == length)
      leaf[static_cast<std::size_t>(g.request)] = static_cast<std::int64_t>(s);
  }
  std::int64_t last_leaf = -1, last_request = -1;
  for (const std::int64_t r : order) {
    const ScoreRequest& request = requests[static_cast<std::size_t>(r)];
    // An input equal to that of the request before has no segment of its own.
    if (leaf[static_cast<std::size_t>(r)] >= 0 &&
        !(last_request >= 0 &&
          std::ranges::equal(input_of(request),
                             input_of(requests[static_cast<std::size_t>(last_request)])))) {
      last_leaf = leaf[static_cast<std::size_t>(r)];
    }
    last_request = r;
    const auto total = static_cast<std::int64_t>(request.tokens.size());
    std::int64_t s = last_leaf;
    for (std::int64_t i = total - 1; i >= total - request.scored; --i) {
      const std::int64_t position = i - 1;
      while (plan.segments[static_cast<std::size_t>(s)].position > position) {
        s = plan.segments[static_cast<std::size_t>(s)].parent;
      }
      const Segment& g = plan.segments[static_cast<std::size_t>(s)];
      plan.targets.push_back(
          {g.first_row + position - g.position, request.tokens[static_cast<std::size_t>(i)], r});
    }
  }
  std::ranges::stable_sort(plan.targets, [](const ScoreTarget& a, const ScoreTarget& b) {
    return a.row != b.row ? a.row < b.row : a.request < b.request;
  });
}

std::int32_t narrow(std::int64_t v) { return static_cast<std::int32_t>(v); }

// The runs of segment `s`, whose own rows begin at `own` among the batch's rows of keys. `where`:
// first row of keys of each segment of the chain.
void add_runs(ScorePlan& plan, std::span<const std::int64_t> chain,
              std::span<const std::int64_t> where, std::int64_t own_row) {
  const Segment& s = plan.segments[static_cast<std::size_t>(chain.back())];
  for (std::int64_t done = 0; done < s.rows; done += run_queries) {
    const std::int64_t n = std::min(run_queries, s.rows - done);
    std::int32_t run[run_columns] = {narrow(own_row + done), narrow(n)};
    std::int64_t keys = 0;
    for (std::size_t i = 0; i < chain.size(); ++i) {
      const bool own = i + 1 == chain.size();
      const std::int64_t rows =
          own ? done + n : plan.segments[static_cast<std::size_t>(chain[i])].rows;
      run[2 + 2 * i] = narrow(where[i]);
      run[3 + 2 * i] = narrow(rows);
      keys += rows;
    }
    plan.pairs += n * (keys - n) + n * (n + 1) / 2;
    plan.runs.insert(plan.runs.end(), run, run + run_columns);
  }
}

// Segments [first, last) as one batch. `kept`: where the chain above the first segment lies;
// becomes where the chain above segment `last` will lie.
class Batcher {
 public:
  Batcher(ScorePlan& plan, std::int64_t kept) : plan_(plan), kept_(kept) {}

  void add(std::int64_t first, std::int64_t last) {
    ScoreBatch batch;
    const Segment& head = segment(first);
    batch.first_row = head.first_row;
    batch.first_run = static_cast<std::int64_t>(plan_.runs.size()) / run_columns;
    for (std::int64_t s = first; s < last; ++s) {
      const std::vector<std::int64_t> chain = chain_of(plan_, s);
      std::vector<std::int64_t> where;
      for (const std::int64_t link : chain) where.push_back(place(link, first, batch.first_row));
      add_runs(plan_, chain, where, segment(s).first_row - batch.first_row);
      batch.rows += segment(s).rows;
    }
    batch.runs = static_cast<std::int64_t>(plan_.runs.size()) / run_columns - batch.first_run;
    sort_runs(batch);
    if (last < static_cast<std::int64_t>(plan_.segments.size())) keep(batch, first, last);
    plan_.batches.push_back(std::move(batch));
  }

 private:
  [[nodiscard]] const Segment& segment(std::int64_t s) const {
    return plan_.segments[static_cast<std::size_t>(s)];
  }

  // The first row of keys of a segment while the batch that begins with `first` is computed. Kept
  // rows lie in two halves of kept_ / 2 rows, used in turn so that no copy overlaps its source.
  [[nodiscard]] std::int64_t place(std::int64_t s, std::int64_t first,
                                   std::int64_t first_row) const {
    if (s >= first) return kept_ + segment(s).first_row - first_row;
    for (std::size_t i = 0; i < chain_.size(); ++i) {
      if (chain_[i] == s) return places_[i];
    }
    throw Error(ErrorCode::internal, "a segment's keys are not kept");
  }

  void keep(ScoreBatch& batch, std::int64_t first, std::int64_t last) {
    std::vector<std::int64_t> chain = chain_of(plan_, last);
    chain.pop_back();
    std::vector<std::int64_t> places;
    std::int64_t to = half_ == 0 ? kept_ / 2 : 0;
    // What lies where it will be needed, because nothing of the chain changed, stays.
    if (chain == chain_) return;
    for (const std::int64_t s : chain) {
      batch.copies.push_back({place(s, first, batch.first_row), to, segment(s).rows});
      places.push_back(to);
      to += segment(s).rows;
    }
    half_ = 1 - half_;
    chain_ = std::move(chain);
    places_ = std::move(places);
  }

  // Long runs first, so that the last ones to finish are short.
  void sort_runs(const ScoreBatch& batch) {
    struct Run {
      std::int32_t v[run_columns];
      std::int64_t work;
    };
    std::vector<Run> runs(static_cast<std::size_t>(batch.runs));
    std::int32_t* at = plan_.runs.data() + batch.first_run * run_columns;
    for (std::size_t i = 0; i < runs.size(); ++i) {
      std::copy_n(at + static_cast<std::int64_t>(i) * run_columns, run_columns, runs[i].v);
      runs[i].work = 0;
      for (std::int64_t s = 0; s < run_spans; ++s) runs[i].work += runs[i].v[3 + 2 * s];
    }
    std::ranges::stable_sort(runs, [](const Run& a, const Run& b) { return a.work > b.work; });
    for (std::size_t i = 0; i < runs.size(); ++i) {
      std::copy_n(runs[i].v, run_columns, at + static_cast<std::int64_t>(i) * run_columns);
    }
  }

  ScorePlan& plan_;
  std::int64_t kept_;
  std::int64_t half_ = 0;
  std::vector<std::int64_t> chain_;   // kept segments, from the first on
  std::vector<std::int64_t> places_;  // their first rows of keys
};

}  // namespace

std::vector<std::int64_t> sorted_requests(std::span<const ScoreRequest> requests) {
  std::vector<std::int64_t> order(requests.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](std::int64_t a, std::int64_t b) {
    return std::ranges::lexicographical_compare(input_of(requests[static_cast<std::size_t>(a)]),
                                                input_of(requests[static_cast<std::size_t>(b)]));
  });
  return order;
}

ScorePlan plan_scores(std::span<const ScoreRequest> requests, std::span<const std::int64_t> order,
                      const ScoreOptions& options) {
  ScorePlan plan;
  plan.segments = Builder(requests, order, options.share).run();
  for (Segment& s : plan.segments) {
    s.first_row = plan.rows();
    const Tokens tokens = input_of(requests[static_cast<std::size_t>(s.request)]);
    for (std::int64_t i = s.position; i < s.position + s.rows; ++i) {
      plan.ids.push_back(tokens[static_cast<std::size_t>(i)]);
      plan.positions.push_back(narrow(i));
    }
    plan.longest = std::max(plan.longest, s.position + s.rows);
  }
  place_targets(plan, requests, order);

  // Batches: as many neighbouring segments as fit.
  std::vector<std::int64_t> first = {0};
  std::int64_t rows = 0, kept = 0;
  const auto count = static_cast<std::int64_t>(plan.segments.size());
  for (std::int64_t s = 0; s < count; ++s) {
    const Segment& g = plan.segments[static_cast<std::size_t>(s)];
    if (rows > 0 && (!options.pack || rows + g.rows > options.batch_rows)) {
      first.push_back(s);
      rows = 0;
      kept = std::max(kept, g.position);
    }
    rows += g.rows;
    plan.batch_rows = std::max(plan.batch_rows, rows);
  }
  first.push_back(count);
  plan.kept = 2 * kept;
  Batcher batcher(plan, plan.kept);
  for (std::size_t b = 0; b + 1 < first.size(); ++b) batcher.add(first[b], first[b + 1]);
  return plan;
}

}  // namespace engine
