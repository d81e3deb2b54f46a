// Where the labels of a chart's points go so that nothing lies on anything.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "eval/svg_canvas.h"

namespace engine {

struct LabelRequest {
  SvgPoint point;
  double clearance = 6;     // px around the point that are its marker's
  double width = 0;         // px of the label
  double number_width = 0;  // px of the number that stands for it if there is no place
  double height = 12;
  bool needed = true;  // else it is placed after the others, near its point or not at all
};

enum class LabelKind : std::uint8_t { text, number, none };

struct LabelPlace {
  LabelKind kind = LabelKind::none;
  SvgBox box;           // of the text or the number
  bool leader = false;  // a line from leader_from (beside the marker) to leader_to (at the box)
  SvgPoint leader_from, leader_to;
};

struct LabelObstacles {
  SvgBox bounds;                    // labels stay inside
  std::vector<SvgBox> boxes;        // never covered (the requests' own points are added)
  std::vector<SvgBox> no_text;      // as boxes, but leaders may cross them
  std::vector<SvgPoint> line_from;  // lines from line_from[i] to line_to[i]: crossed if need be
  std::vector<SvgPoint> line_to;
};

// One place per request. Boxes of labels overlap neither each other nor obstacles nor leaders.
// Greedy: points in dense places choose first; each takes the free place around its point that is
// near and crosses few lines.
[[nodiscard]] std::vector<LabelPlace> place_labels(std::span<const LabelRequest> requests,
                                                   const LabelObstacles& obstacles);

// Whether the lines a-b and c-d cross.
[[nodiscard]] bool lines_cross(SvgPoint a, SvgPoint b, SvgPoint c, SvgPoint d);

// Whether a line from `from` to `to` has a point inside the box.
[[nodiscard]] bool line_meets_box(SvgPoint from, SvgPoint to, const SvgBox& box);

}  // namespace engine
