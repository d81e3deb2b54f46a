#include "eval/svg_labels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <numeric>

namespace engine {
namespace {

constexpr double gap = 2;            // px between a marker and its label
constexpr double crowd_radius = 70;  // px; more points within it: chooses earlier
// What a place costs, in px further out: a line behind the label, a leader line, a direction later
// in the order.
constexpr double line_cost = 28, leader_cost = 8, turn_cost = 0.8;
constexpr std::array<double, 9> rings = {0, 9, 16, 24, 34, 46, 60, 76, 94};  // px further out
constexpr std::size_t near_rings = 3;  // for labels that are not needed

// Right and left read best, then the diagonals.
constexpr double diagonal = 0.75;
constexpr std::array<SvgPoint, 12> directions = {{{1, 0},
                                                  {-1, 0},
                                                  {diagonal, -diagonal},
                                                  {diagonal, diagonal},
                                                  {-diagonal, -diagonal},
                                                  {-diagonal, diagonal},
                                                  {0, -1},
                                                  {0, 1},
                                                  {0.92, -0.4},
                                                  {0.92, 0.4},
                                                  {-0.92, -0.4},
                                                  {-0.92, 0.4}}};

SvgBox around(SvgPoint p, double half) { return {p.x - half, p.y - half, p.x + half, p.y + half}; }

// The box of a label whose nearest edge or corner is at the anchor.
SvgBox box_at(SvgPoint anchor, SvgPoint direction, double width, double height) {
  const auto begin = [](double at, double d, double size) {
    if (d > 0.5) return at;
    if (d < -0.5) return at - size;
    return at - size / 2 + d * size / 2;
  };
  const double left = begin(anchor.x, direction.x, width);
  const double top = begin(anchor.y, direction.y, height);
  return {left, top, left + width, top + height};
}

class Placer {
 public:
  Placer(std::span<const LabelRequest> requests, const LabelObstacles& obstacles)
      : requests_(requests), obstacles_(obstacles), places_(requests.size()) {
    taken_ = obstacles.boxes;
    for (const LabelRequest& r : requests) taken_.push_back(around(r.point, r.clearance));
  }

  std::vector<LabelPlace> run() {
    for (const std::size_t i : order()) {
      const LabelRequest& r = requests_[i];
      const std::size_t reach = r.needed ? rings.size() : near_rings;
      if (r.width <= 0 || place(i, r.width, LabelKind::text, reach)) continue;
      if (r.needed) left_over_.push_back(i);
    }
    for (const std::size_t i : left_over_) {
      place(i, requests_[i].number_width, LabelKind::number, rings.size());
    }
    return std::move(places_);
  }

 private:
  std::vector<std::size_t> order() const {
    std::vector<std::size_t> crowd(requests_.size(), 0), order(requests_.size());
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      for (const LabelRequest& other : requests_) {
        const double dx = other.point.x - requests_[i].point.x;
        const double dy = other.point.y - requests_[i].point.y;
        crowd[i] += std::hypot(dx, dy) < crowd_radius ? 1 : 0;
      }
    }
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      if (requests_[a].needed != requests_[b].needed) return requests_[a].needed;
      return crowd[a] > crowd[b];
    });
    return order;
  }

  bool free(const SvgBox& box) const {
    if (!obstacles_.bounds.contains(box)) return false;
    for (const SvgBox& other : taken_) {
      if (box.overlaps(other)) return false;
    }
    for (const SvgBox& other : obstacles_.no_text) {
      if (box.overlaps(other)) return false;
    }
    for (std::size_t i = 0; i < leader_from_.size(); ++i) {
      if (line_meets_box(leader_from_[i], leader_to_[i], box)) return false;
    }
    return true;
  }

  // A leader passes neither labels nor markers nor leaders. Markers that lie on its own are an
  // exception: it could not begin otherwise.
  bool free_leader(std::size_t index, SvgPoint from, SvgPoint to) const {
    const std::size_t first_marker = obstacles_.boxes.size();
    const SvgBox& own = taken_[first_marker + index];
    for (std::size_t i = 0; i < taken_.size(); ++i) {
      const bool marker = i >= first_marker && i < first_marker + requests_.size();
      if (marker && taken_[i].overlaps(own)) continue;
      if (line_meets_box(from, to, taken_[i])) return false;
    }
    for (std::size_t i = 0; i < leader_from_.size(); ++i) {
      if (lines_cross(from, to, leader_from_[i], leader_to_[i])) return false;
    }
    return true;
  }

  std::size_t crossings(const SvgBox& box) const {
    std::size_t count = 0;
    for (std::size_t i = 0; i < obstacles_.line_from.size(); ++i) {
      count += line_meets_box(obstacles_.line_from[i], obstacles_.line_to[i], box) ? 1 : 0;
    }
    return count;
  }

  bool place(std::size_t index, double width, LabelKind kind, std::size_t reach) {
    const LabelRequest& r = requests_[index];
    double best = 1e30;
    LabelPlace found;
    for (std::size_t ring = 0; ring < reach; ++ring) {
      const double further = rings[ring] + (ring > 0 ? leader_cost : 0);
      if (further >= best) break;
      const double distance = r.clearance + gap + rings[ring];
      for (std::size_t d = 0; d < directions.size(); ++d) {
        const SvgPoint direction = directions[d];
        const SvgPoint anchor{r.point.x + distance * direction.x,
                              r.point.y + distance * direction.y};
        const SvgBox box = box_at(anchor, direction, width, r.height);
        if (!free(box)) continue;
        LabelPlace place{kind, box, ring > 0, {}, {}};
        if (place.leader) {
          place.leader_from = {r.point.x + r.clearance * direction.x,
                               r.point.y + r.clearance * direction.y};
          place.leader_to = {std::clamp(anchor.x, box.left, box.right),
                             std::clamp(anchor.y, box.top, box.bottom)};
          if (!free_leader(index, place.leader_from, place.leader_to)) continue;
        }
        const double cost = further + static_cast<double>(d) * turn_cost +
                            static_cast<double>(crossings(box)) * line_cost;
        if (cost >= best) continue;
        best = cost;
        found = place;
      }
    }
    if (found.kind == LabelKind::none) return false;
    places_[index] = found;
    taken_.push_back(found.box);
    if (found.leader) {
      leader_from_.push_back(found.leader_from);
      leader_to_.push_back(found.leader_to);
    }
    return true;
  }

  std::span<const LabelRequest> requests_;
  const LabelObstacles& obstacles_;
  std::vector<LabelPlace> places_;
  std::vector<SvgBox> taken_;  // obstacles, then the requests' markers, then labels
  std::vector<SvgPoint> leader_from_, leader_to_;
  std::vector<std::size_t> left_over_;
};

}  // namespace

bool lines_cross(SvgPoint a, SvgPoint b, SvgPoint c, SvgPoint d) {
  // Twice the area of a triangle, with the sign of its sense of rotation.
  const auto area = [](SvgPoint p, SvgPoint q, SvgPoint r) {
    return (q.x - p.x) * (r.y - p.y) - (q.y - p.y) * (r.x - p.x);
  };
  const auto opposite = [](double s, double t) { return (s < 0) != (t < 0); };
  return opposite(area(a, b, c), area(a, b, d)) && opposite(area(c, d, a), area(c, d, b));
}

bool line_meets_box(SvgPoint from, SvgPoint to, const SvgBox& box) {
  // The part of the line, as fractions of it, that is inside both pairs of edges.
  double begin = 0, end = 1;
  const auto cut = [&](double start, double delta, double low, double high) {
    if (delta == 0) return start > low && start < high;
    double a = (low - start) / delta, b = (high - start) / delta;
    if (a > b) std::swap(a, b);
    begin = std::max(begin, a);
    end = std::min(end, b);
    return true;
  };
  if (!cut(from.x, to.x - from.x, box.left, box.right)) return false;
  if (!cut(from.y, to.y - from.y, box.top, box.bottom)) return false;
  return begin < end;
}

std::vector<LabelPlace> place_labels(std::span<const LabelRequest> requests,
                                     const LabelObstacles& obstacles) {
  return Placer(requests, obstacles).run();
}

}  // namespace engine
