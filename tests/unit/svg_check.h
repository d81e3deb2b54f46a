// A small reader of SVG files for tests: is it well-formed XML, are all texts inside the drawing,
// do texts overlap.
#pragma once

#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "eval/svg_canvas.h"
#include "eval/svg_text.h"

namespace engine::test {

struct SvgCheck {
  std::string problem;                   // why it is no XML; empty: it is
  std::vector<std::string> outside;      // texts not inside the viewBox
  std::vector<std::string> overlapping;  // "one / other"
  std::vector<std::string> texts;        // contents of the text elements
  [[nodiscard]] bool good() const {
    return problem.empty() && outside.empty() && overlapping.empty() && !texts.empty();
  }
  [[nodiscard]] std::string text() const {
    std::string out = problem;
    for (const std::string& t : outside) out += "\noutside: " + t;
    for (const std::string& t : overlapping) out += "\noverlapping: " + t;
    return out;
  }
};

class SvgReader {
 public:
  explicit SvgReader(std::string_view xml) : xml_(xml) {}

  SvgCheck run() {
    if (xml_.starts_with("<?xml")) at_ = xml_.find("?>") + 2;
    while (check_.problem.empty() && at_ < xml_.size()) {
      if (xml_[at_] == '<') {
        tag();
      } else {
        content();
      }
    }
    if (check_.problem.empty() && (!open_.empty() || roots_ != 1)) {
      check_.problem = open_.empty() ? "not one root" : "<" + open_.back() + "> is never closed";
    }
    for (std::size_t i = 0; i < boxes_.size(); ++i) {
      if (!view_.contains(boxes_[i])) check_.outside.push_back(check_.texts[i]);
      for (std::size_t j = 0; j < i; ++j) {
        if (boxes_[i].overlaps(boxes_[j])) {
          check_.overlapping.push_back(check_.texts[j] + " / " + check_.texts[i]);
        }
      }
    }
    return check_;
  }

 private:
  using Attributes = std::map<std::string, std::string>;

  void fail(const std::string& problem) {
    if (check_.problem.empty()) check_.problem = problem;
  }

  // Text with its entities resolved.
  std::string resolved(std::string_view text) {
    static const std::map<std::string, std::string, std::less<>> entities = {
        {"amp", "&"}, {"lt", "<"}, {"gt", ">"}, {"quot", "\""}};
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] == '<' || text[i] == '>') fail("markup in text: " + std::string(text));
      if (text[i] != '&') {
        out += text[i];
        continue;
      }
      const std::size_t end = text.find(';', i);
      const auto entity = end == std::string_view::npos
                              ? entities.end()
                              : entities.find(text.substr(i + 1, end - i - 1));
      if (entity == entities.end()) {
        fail("unescaped & in: " + std::string(text));
        return out;
      }
      out += entity->second;
      i = end;
    }
    return out;
  }

  void tag() {
    const std::size_t end = xml_.find('>', at_);
    if (end == std::string_view::npos) return fail("a tag does not end");
    std::string_view inside = xml_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    if (inside.starts_with('/')) {
      const std::string name(inside.substr(1));
      if (open_.empty() || open_.back() != name) {
        return fail("</" + name + "> closes <" + (open_.empty() ? "" : open_.back()) + ">");
      }
      open_.pop_back();
      return;
    }
    const bool closed = inside.ends_with('/');
    if (closed) inside.remove_suffix(1);
    const std::size_t name_end = std::min(inside.find(' '), inside.size());
    const std::string name(inside.substr(0, name_end));
    attributes_ = read_attributes(inside.substr(name_end));
    if (open_.empty()) ++roots_;
    if (name == "svg") read_view();
    if (!closed) open_.push_back(name);
  }

  Attributes read_attributes(std::string_view text) {
    Attributes found;
    while (!text.empty()) {
      const std::size_t equal = text.find("=\"");
      if (text[0] != ' ' || equal == std::string_view::npos) {
        fail("no attribute: " + std::string(text));
        return found;
      }
      const std::size_t end = text.find('"', equal + 2);
      const std::string name(text.substr(1, equal - 1));
      if (end == std::string_view::npos || found.contains(name)) {
        fail("a broken attribute: " + std::string(text));
        return found;
      }
      found[name] = resolved(text.substr(equal + 2, end - equal - 2));
      text.remove_prefix(end + 1);
    }
    return found;
  }

  double number(const std::string& name) {
    const auto found = attributes_.find(name);
    if (found == attributes_.end()) return 0;
    char* end = nullptr;
    const double value = std::strtod(found->second.c_str(), &end);
    if (*end != '\0') fail(name + " is no number: " + found->second);
    return value;
  }

  void read_view() {
    char* rest = nullptr;
    const std::string view = attributes_["viewBox"];
    view_.left = std::strtod(view.c_str(), &rest);
    view_.top = std::strtod(rest, &rest);
    view_.right = view_.left + std::strtod(rest, &rest);
    view_.bottom = view_.top + std::strtod(rest, &rest);
    if (*rest != '\0' || view_.width() <= 0 || view_.height() <= 0) fail("viewBox: " + view);
  }

  void content() {
    const std::size_t end = std::min(xml_.find('<', at_), xml_.size());
    const std::string text = resolved(xml_.substr(at_, end - at_));
    at_ = end;
    if (open_.empty()) {
      if (text.find_first_not_of(" \n") != std::string::npos) fail("text outside the root");
      return;
    }
    if (open_.back() != "text") return;
    const double size = number("font-size");
    const double width = text_width(text, size, attributes_["font-weight"] == "bold");
    const std::string anchor = attributes_["text-anchor"];
    const double before = anchor == "middle" ? width / 2 : anchor == "end" ? width : 0;
    const double x = number("x"), y = number("y");
    const bool turned = attributes_["transform"].starts_with("rotate(-90");
    check_.texts.push_back(text);
    boxes_.push_back(
        turned ? SvgBox{x - 0.78 * size, y - width + before, x + 0.22 * size, y + before}
               : SvgBox{x - before, y - 0.78 * size, x - before + width, y + 0.22 * size});
  }

  std::string_view xml_;
  std::size_t at_ = 0, roots_ = 0;
  std::vector<std::string> open_;
  Attributes attributes_;
  SvgBox view_;
  std::vector<SvgBox> boxes_;
  SvgCheck check_;
};

inline SvgCheck check_svg(std::string_view xml) { return SvgReader(xml).run(); }

}  // namespace engine::test
