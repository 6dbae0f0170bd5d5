#include "common/arguments.h"

#include <algorithm>

#include "base/check.h"

namespace specrt::bench {
namespace {

bool contains(const std::vector<std::string>& list, const std::string& item) { return std::find(list.begin(), list.end(), item) != list.end(); }

std::string joined(const std::vector<std::string>& list) {
  std::string text;
  for (const std::string& item : list) text += (text.empty() ? "" : ", ") + item;
  return text;
}

}  // namespace

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> pieces(1);
  for (const char c : text) {
    if (c == separator) pieces.emplace_back();
    else pieces.back() += c;
  }
  return pieces;
}

Arguments::Arguments(int argc, char** argv, std::string usage, std::vector<std::string> rows, std::vector<std::string> values, std::vector<std::string> switches)
    : wanted_(rows) {
  values.insert(values.end(), {"--rows", "--json"});
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help") {
      std::printf("%s\n\n  --rows A,B   measure these rows only\n  --list       name the rows\n  --json FILE  write the measured rows too, one JSON object a line\n", usage.c_str());
      answered_ = true;
    } else if (option == "--list") {
      for (const std::string& row : rows) std::printf("%s\n", row.c_str());
      answered_ = true;
    } else if (contains(values, option)) {
      if (i + 1 == argc) fail(option + " needs a value");
      given_[option] = argv[++i];
    } else if (contains(switches, option)) {
      given_[option] = "";
    } else {
      fail("unknown option '" + option + "'; there are --help, --list, " + joined(values) + (switches.empty() ? "" : ", " + joined(switches)));
    }
  }
  if (answered_ || !has("--rows")) return;
  wanted_ = split(given_["--rows"], ',');
  for (const std::string& row : wanted_)
    if (!contains(rows, row)) fail("--rows: no row is called '" + row + "'; there are " + joined(rows));
}

bool Arguments::wants(const std::string& row) const { return contains(wanted_, row); }

}  // namespace specrt::bench
