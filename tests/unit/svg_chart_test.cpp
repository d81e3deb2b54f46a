// Charts: ticks, places of labels, and files that any reader of SVG takes.
#include "eval/svg_chart.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "engine/core/error.h"
#include "engine/core/rng.h"
#include "eval/svg_labels.h"
#include "eval/svg_legend.h"
#include "eval/svg_text.h"
#include "tests/unit/svg_check.h"

namespace engine {
namespace {

using test::check_svg;
using test::SvgCheck;

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

std::vector<std::string> labels_of(const Axis& axis) {
  std::vector<std::string> labels;
  for (const AxisTick& t : axis.ticks()) {
    if (!t.label.empty()) labels.push_back(t.label);
  }
  return labels;
}

Axis axis_of(AxisScale scale, const std::vector<double>& values, double length = 480,
             AxisDirection direction = AxisDirection::vertical) {
  return Axis({.title = "t", .scale = scale}, values, length, direction);
}

XyChart small_chart() {
  XyChart chart;
  chart.text.title = "A < B & \"C\"";
  chart.x.title = "x (px)";
  chart.y.title = "y (s)";
  ChartSeries series{.name = "one & only"};
  series.points = {{.x = 1, .y = 2, .label = "<1>"}, {.x = 2, .y = 8}, {.x = 4, .y = 5}};
  chart.series.push_back(series);
  return chart;
}

TEST(SvgCheckTool, RefusesWhatIsNotXml) {
  EXPECT_EQ(check_svg("<svg viewBox=\"0 0 9 9\"><g></svg>").problem, "</svg> closes <g>");
  EXPECT_NE(check_svg("<svg viewBox=\"0 0 9 9\"><text>a & b</text></svg>").problem, "");
  EXPECT_NE(check_svg("<svg viewBox=\"0 0 9 9\">").problem, "");
  EXPECT_NE(check_svg("<svg viewBox=\"0 0 9 9\" a=b></svg>").problem, "");
  EXPECT_EQ(check_svg("<svg viewBox=\"0 0 9 9\"><g/></svg>").problem, "");
  const SvgCheck outside = check_svg(
      "<svg viewBox=\"0 0 50 20\"><text x=\"40\" y=\"15\" font-size=\"10\">long</text></svg>");
  EXPECT_EQ(outside.problem, "");
  EXPECT_EQ(outside.outside, std::vector<std::string>{"long"});
  const SvgCheck twice = check_svg(
      "<svg viewBox=\"0 0 90 20\"><text x=\"4\" y=\"15\" font-size=\"10\">ab</text>"
      "<text x=\"9\" y=\"16\" font-size=\"10\">cd</text></svg>");
  EXPECT_EQ(twice.overlapping, std::vector<std::string>{"ab / cd"});
}

TEST(SvgText, EscapesAndReplacesWhatXmlDoesNotTake) {
  EXPECT_EQ(xml_text("a<b>&\"c\""), "a&lt;b&gt;&amp;&quot;c&quot;");
  EXPECT_EQ(xml_text("a\nb\tc"), "a b c");
  EXPECT_EQ(xml_text(std::string("a\x01\xff", 3)), "a\uFFFD\uFFFD");
  EXPECT_EQ(xml_text("é–"), "é–");
}

TEST(SvgText, WritesNumbers) {
  EXPECT_EQ(svg_number(1.5), "1.5");
  EXPECT_EQ(svg_number(-0.001), "0");
  EXPECT_EQ(svg_number(120), "120");
  EXPECT_EQ(svg_number(1.236), "1.24");
  EXPECT_EQ(value_text(33.4321), "33.4");
  EXPECT_EQ(value_text(999.96), "1000");
  EXPECT_EQ(value_text(15234), "15234");
  EXPECT_EQ(value_text(1.234e6), "1.23×10⁶");
  EXPECT_EQ(value_text(0.000012), "1.20×10⁻⁵");
  EXPECT_EQ(value_text(0), "0");
  EXPECT_EQ(value_text(-inf), "-inf");
}

TEST(SvgText, WrapsAtSpacesAndInsideWordsThatAreTooLong) {
  const double width = text_width("three words", 12) + 0.01;
  EXPECT_EQ(wrap_text("three words wrapped", 12, width),
            (std::vector<std::string>{"three words", "wrapped"}));
  EXPECT_EQ(wrap_text("", 12, width), std::vector<std::string>{""});
  std::string whole;
  for (const std::string& line : wrap_text(std::string(200, 'w'), 12, 100)) {
    EXPECT_LE(text_width(line, 12), 100);
    EXPECT_FALSE(line.empty());
    whole += line;
  }
  EXPECT_EQ(whole, std::string(200, 'w'));
}

TEST(SvgAxis, TicksAreRoundNumbers) {
  EXPECT_EQ(
      labels_of(axis_of(AxisScale::linear, {0, 100})),
      (std::vector<std::string>{"0", "10", "20", "30", "40", "50", "60", "70", "80", "90", "100"}));
  EXPECT_EQ(labels_of(axis_of(AxisScale::linear, {0, 100}, 160)),
            (std::vector<std::string>{"0", "20", "40", "60", "80", "100"}));
  EXPECT_EQ(labels_of(axis_of(AxisScale::linear, {-0.2, 0.2}, 160)),
            (std::vector<std::string>{"-0.2", "-0.1", "0", "0.1", "0.2"}));
  EXPECT_EQ(labels_of(axis_of(AxisScale::linear, {0, 4e8}, 150)),
            (std::vector<std::string>{"0", "1×10⁸", "2×10⁸", "3×10⁸", "4×10⁸"}));
}

TEST(SvgAxis, LogTicksFollowTheRange) {
  EXPECT_EQ(labels_of(axis_of(AxisScale::log10, {33, 5000})),
            (std::vector<std::string>{"30", "50", "100", "200", "300", "500", "1000", "2000",
                                      "3000", "5000"}));
  EXPECT_EQ(labels_of(axis_of(AxisScale::log10, {1, 1e6})),
            (std::vector<std::string>{"1", "10", "100", "1000", "10⁴", "10⁵", "10⁶"}));
  EXPECT_EQ(labels_of(axis_of(AxisScale::log10, {6, 6.5}, 150)),
            (std::vector<std::string>{"6.0", "6.1", "6.2", "6.3", "6.4", "6.5"}));
  // Decades without labels between those that have one.
  const std::vector<std::string> sparse = labels_of(axis_of(AxisScale::log10, {1e-80, 1e80}));
  EXPECT_GE(sparse.size(), 5U);
  EXPECT_LE(sparse.size(), 20U);
}

TEST(SvgAxis, LabelledTicksNeverTouchAndLieInside) {
  for (const AxisScale scale : {AxisScale::linear, AxisScale::log10}) {
    for (const double low : {1e-9, 0.02, 1.0, 33.0, 123456.0}) {
      for (const double ratio : {1.0, 1.0000001, 1.1, 2.6, 8.0, 150.0, 1e6, 1e30}) {
        for (const double length : {60.0, 300.0, 620.0}) {
          const Axis axis = axis_of(scale, {low, low * ratio}, length, AxisDirection::horizontal);
          double end = -1e9;
          for (const AxisTick& t : axis.ticks()) {
            EXPECT_GE(t.value, axis.low() * (1 - 1e-6) - 1e-12);
            EXPECT_LE(t.value, axis.high() * (1 + 1e-6) + 1e-12);
            if (t.label.empty()) continue;
            const double half = text_width(t.label, svg_look::tick_size) / 2;
            EXPECT_GE(axis.position(t.value) - half, end) << low << " " << ratio << " " << length;
            end = axis.position(t.value) + half;
          }
          EXPECT_LT(axis.ticks().size(), 1000U);
          EXPECT_LE(axis.position(low), axis.position(low * ratio));
        }
      }
    }
  }
}

TEST(SvgAxis, WholeNumbersOnly) {
  const Axis axis({.title = "block", .integers = true}, std::vector<double>{0, 1, 2, 3}, 600,
                  AxisDirection::horizontal);
  EXPECT_EQ(labels_of(axis), (std::vector<std::string>{"0", "1", "2", "3"}));
  EXPECT_EQ(axis.ticks().size(), 4U);
  const Axis one({.title = "block", .integers = true}, std::vector<double>{0}, 600,
                 AxisDirection::horizontal);
  EXPECT_EQ(labels_of(one), std::vector<std::string>{"0"});
}

TEST(SvgAxis, TakesOnlyWhatItCanShow) {
  EXPECT_TRUE(axis_of(AxisScale::log10, {0, -1, inf, nan_value}).empty());
  const Axis axis = axis_of(AxisScale::log10, {0, 10, 100, inf});
  EXPECT_FALSE(axis.empty());
  EXPECT_GT(axis.low(), 5);
  EXPECT_LT(axis.high(), 200);
  EXPECT_FALSE(Axis::shows(AxisScale::linear, 1e200));
  const Axis bars({.title = "s", .bars = true}, std::vector<double>{3, 9}, 300,
                  AxisDirection::horizontal);
  EXPECT_EQ(bars.low(), 0);
}

std::vector<LabelRequest> random_requests(std::size_t n, double spread) {
  std::vector<LabelRequest> requests;
  for (std::size_t i = 0; i < n; ++i) {
    requests.push_back(
        {.point = {300 + spread * bell_value(5, 0, i), 200 + spread * bell_value(5, 1, i)},
         .width = 30 + 10 * static_cast<double>(i % 4),
         .number_width = 14,
         .height = 11,
         .needed = i % 5 != 0});
  }
  return requests;
}

TEST(SvgLabels, NeverOverlapAnything) {
  for (const double spread : {5.0, 40.0, 120.0}) {
    const std::vector<LabelRequest> requests = random_requests(80, spread);
    LabelObstacles obstacles;
    obstacles.bounds = {0, 0, 600, 400};
    obstacles.boxes = {{280, 100, 320, 130}};
    obstacles.no_text = {{0, 198, 600, 202}};
    obstacles.line_from = {{0, 0}};
    obstacles.line_to = {{600, 400}};
    const std::vector<LabelPlace> places = place_labels(requests, obstacles);
    ASSERT_EQ(places.size(), requests.size());
    std::size_t placed = 0;
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (places[i].kind == LabelKind::none) continue;
      ++placed;
      const SvgBox& box = places[i].box;
      EXPECT_NEAR(box.width(), places[i].kind == LabelKind::text ? requests[i].width : 14, 1e-9);
      EXPECT_TRUE(obstacles.bounds.contains(box));
      EXPECT_FALSE(box.overlaps(obstacles.boxes[0]));
      EXPECT_FALSE(box.overlaps(obstacles.no_text[0]));
      for (std::size_t j = 0; j < places.size(); ++j) {
        const SvgPoint p = requests[j].point;
        EXPECT_FALSE(box.overlaps({p.x - 6, p.y - 6, p.x + 6, p.y + 6})) << i << " " << j;
        if (j == i || places[j].kind == LabelKind::none) continue;
        EXPECT_FALSE(box.overlaps(places[j].box)) << i << " " << j;
        if (!places[j].leader) continue;
        EXPECT_FALSE(line_meets_box(places[j].leader_from, places[j].leader_to, box));
        if (!places[i].leader) continue;
        EXPECT_FALSE(lines_cross(places[i].leader_from, places[i].leader_to, places[j].leader_from,
                                 places[j].leader_to));
      }
    }
    if (spread > 100) {
      EXPECT_GE(placed, 60U);
    } else if (spread < 10) {
      EXPECT_LT(placed, 80U);
    }
  }
}

TEST(SvgLabels, LonelyPointsHaveTheirLabelAtTheRight) {
  const LabelObstacles open{
      .bounds = {0, 0, 200, 100}, .boxes = {}, .no_text = {}, .line_from = {}, .line_to = {}};
  const std::vector<LabelRequest> request = {{.point = {50, 50}, .width = 40, .number_width = 9}};
  const LabelPlace right = place_labels(request, open)[0];
  EXPECT_EQ(right.kind, LabelKind::text);
  EXPECT_FALSE(right.leader);
  EXPECT_GT(right.box.left, 50);
  // Too long for the bounds: its number; of a label that is not needed, nothing.
  std::vector<LabelRequest> wide = request;
  wide[0].width = 300;
  EXPECT_EQ(place_labels(wide, open)[0].kind, LabelKind::number);
  wide[0].needed = false;
  EXPECT_EQ(place_labels(wide, open)[0].kind, LabelKind::none);
}

TEST(SvgLabels, LinesAndBoxes) {
  const SvgBox box{10, 10, 20, 20};
  EXPECT_TRUE(line_meets_box({0, 0}, {30, 30}, box));
  EXPECT_TRUE(line_meets_box({15, 0}, {15, 30}, box));
  EXPECT_FALSE(line_meets_box({0, 0}, {9, 9}, box));
  EXPECT_FALSE(line_meets_box({0, 25}, {30, 25}, box));
  EXPECT_FALSE(line_meets_box({0, 25}, {25, 40}, box));
  EXPECT_TRUE(lines_cross({0, 0}, {10, 10}, {0, 10}, {10, 0}));
  EXPECT_FALSE(lines_cross({0, 0}, {10, 10}, {6, 0}, {10, 4}));
}

TEST(SvgLegendTest, GrowsInColumnsThenDownwards) {
  std::vector<LegendEntry> entries;
  for (int i = 0; i < 60; ++i) {
    entries.push_back({.name = "series " + std::to_string(i),
                       .style = series_style(static_cast<std::size_t>(i))});
  }
  const Legend three(entries, 480, 620);
  EXPECT_LE(three.height(), 480);
  EXPECT_LE(three.width(), 620);
  const Legend narrow(entries, 480, 10);
  EXPECT_GT(narrow.height(), 480);
  EXPECT_LT(narrow.width(), three.width());
  EXPECT_EQ(Legend({}, 480, 620).width(), 0);
}

TEST(SvgStyle, SeventyTwoSeriesLookDifferent) {
  for (std::size_t i = 0; i < 72; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const SeriesStyle a = series_style(i), b = series_style(j);
      EXPECT_FALSE(a.colour == b.colour && a.marker == b.marker) << i << " " << j;
    }
  }
}

TEST(SvgXyChart, IsAFileThatReadersTake) {
  const std::string svg = xy_chart_svg(small_chart());
  EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
  EXPECT_NE(svg.find("A &lt; B &amp; &quot;C&quot;"), std::string::npos);
  EXPECT_NE(svg.find(">one &amp; only<"), std::string::npos);
  EXPECT_NE(svg.find(">&lt;1&gt;<"), std::string::npos);
  EXPECT_NE(svg.find(">x (px)<"), std::string::npos);
  EXPECT_EQ(svg, xy_chart_svg(small_chart()));
}

TEST(SvgXyChart, NothingToDrawIsNoFile) {
  XyChart chart;
  EXPECT_EQ(xy_chart_svg(chart), "");
  ChartSeries wrong;
  wrong.name = "all wrong";
  wrong.points = {{.x = nan_value, .y = 1}, {.x = 1, .y = inf}};
  chart.series.push_back(wrong);
  EXPECT_EQ(xy_chart_svg(chart), "");
  chart.y.scale = AxisScale::log10;
  chart.series[0].points = {{.x = 1, .y = 0}};
  EXPECT_EQ(xy_chart_svg(chart), "");
}

TEST(SvgXyChart, NamesWhatItLeavesOut) {
  XyChart chart = small_chart();
  chart.y.scale = AxisScale::log10;
  chart.series[0].points.push_back({.x = 3, .y = 0, .name = "the zero"});
  chart.series[0].points.push_back({.x = 5, .y = inf, .name = "the infinite"});
  const std::string svg = xy_chart_svg(chart);
  EXPECT_NE(svg.find("the zero (0), the infinite (inf)."), std::string::npos);
  EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
  for (int i = 0; i < 20; ++i) chart.series[0].points.push_back({.x = 1, .y = nan_value});
  EXPECT_NE(xy_chart_svg(chart).find("and 14 more"), std::string::npos);
}

TEST(SvgXyChart, OnePointEqualValuesAndHugeRanges) {
  for (const AxisScale scale : {AxisScale::linear, AxisScale::log10}) {
    for (const std::vector<double>& values :
         {std::vector<double>{7}, {5, 5, 5}, {1, 1e6}, {1e-90, 1e90}, {1e15, 1e15 + 1}}) {
      XyChart chart = small_chart();
      chart.y.scale = scale;
      chart.series[0].points.clear();
      for (const double v : values) {
        chart.series[0].points.push_back({.x = 3, .y = v, .y_error = v / 2, .label = "p"});
      }
      const std::string svg = xy_chart_svg(chart);
      EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
    }
  }
}

TEST(SvgXyChart, SixtySeriesWithLongNamesAndLabels) {
  XyChart chart = small_chart();
  chart.text.title = std::string(300, 'T') + " and more words of a title that does not end";
  chart.y.title =
      "a title of the axis which is longer than the axis itself, so that it needs two "
      "lines, or three of them, as it goes on (unit)";
  chart.series.clear();
  for (std::size_t i = 0; i < 60; ++i) {
    ChartSeries series{.name = "series with a name that needs more than a line of its legend " +
                               std::to_string(i)};
    series.style = series_style(i);
    for (std::size_t k = 0; k < 5; ++k) {
      series.points.push_back({.x = 10 + bell_value(1, i, k),
                               .y = 10 + bell_value(2, i, k),
                               .label = "label " + std::to_string(i),
                               .name = "point"});
    }
    chart.series.push_back(series);
  }
  const std::string svg = xy_chart_svg(chart);
  const SvgCheck check = check_svg(svg);
  EXPECT_TRUE(check.good()) << check.text();
  EXPECT_NE(svg.find("legend 59"), std::string::npos);
  EXPECT_NE(svg.find("Numbers: 1: point"), std::string::npos);
  EXPECT_EQ(svg, xy_chart_svg(chart));
}

TEST(SvgBarChart, HasEveryValueAndSaysWhatIsMissing) {
  BarChart chart;
  chart.text.title = "costs";
  chart.groups = {{"first", series_style(0), {"a", "b <c>"}},
                  {"second", series_style(1), {std::string(120, 'l')}}};
  chart.panels = {{{.title = "time (s)"}, {1.25, 40.0, std::nullopt}},
                  {{.title = "memory (GB)", .scale = AxisScale::log10}, {1.0, 0.0, 5000.0}}};
  const std::string svg = bar_chart_svg(chart);
  EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
  for (const char* text : {">1.25<", ">40.0<", ">5000<", ">b &lt;c&gt;<", ">–<"}) {
    EXPECT_NE(svg.find(text), std::string::npos) << text;
  }
  EXPECT_NE(svg.find("A bar marked –"), std::string::npos);
  chart.panels[0].values = {nan_value, std::nullopt, std::nullopt};
  chart.panels.pop_back();
  EXPECT_EQ(bar_chart_svg(chart), "");
  chart.panels[0].values.pop_back();
  EXPECT_THROW((void)bar_chart_svg(chart), Error);
}

TEST(SvgHeatMap, HasCellsLabelsAndAScale) {
  HeatMap chart;
  chart.text.title = "errors";
  chart.x_title = "block";
  chart.y_title = "site";
  chart.rows = {"q", "a name that is too long for the place beside the cells of its row"};
  chart.colour = {.title = "relative error", .scale = AxisScale::log10};
  for (int i = 0; i < 80; ++i) chart.columns.push_back(std::to_string(i));
  for (int i = 0; i < 160; ++i) chart.values.emplace_back(std::pow(10.0, -i / 40.0));
  chart.values[7] = 0;
  chart.values[8] = std::nullopt;
  const std::string svg = heat_map_svg(chart);
  EXPECT_TRUE(check_svg(svg).good()) << check_svg(svg).text();
  EXPECT_NE(svg.find("Crossed cells"), std::string::npos);
  EXPECT_NE(svg.find("#fae650"), std::string::npos) << "the lightest colour, of the largest value";
  chart.values.pop_back();
  EXPECT_THROW((void)heat_map_svg(chart), Error);
  chart.values.assign(160, std::nullopt);
  EXPECT_EQ(heat_map_svg(chart), "");
}

TEST(ParetoFront, KeepsWhatNothingBeats) {
  const std::vector<SvgPoint> points = {{2, 9}, {3, 5},         {3, 4}, {4, 4.5},
                                        {5, 1}, {1, nan_value}, {6, 1}, {5, 1}};
  EXPECT_EQ(pareto_front(points, false), (std::vector<std::size_t>{0, 2, 4}));
  EXPECT_EQ(pareto_front(points, true), std::vector<std::size_t>{0});
  const std::vector<SvgPoint> rising = {{4, 3}, {1, 1}, {2, 0.5}, {3, 2}};
  EXPECT_EQ(pareto_front(rising, true), (std::vector<std::size_t>{1, 3, 0}));
  EXPECT_TRUE(pareto_front({}, true).empty());
}

}  // namespace
}  // namespace engine
