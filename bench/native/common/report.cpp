#include "common/report.h"

#include "base/check.h"

namespace specrt::bench {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

std::string number_or_null(double value) { return value > 0 ? number(value) : "null"; }

// "-" where there is nothing to say.
std::string cell(double value, const char* format) {
  char text[32];
  if (!(value > 0)) return "-";
  std::snprintf(text, sizeof text, format, value);
  return text;
}

}  // namespace

Report::Report(const std::string& json, const std::string& machine, double read_bandwidth) : machine_(machine), bandwidth_(read_bandwidth) {
  if (!json.empty() && !(file_ = std::fopen(json.c_str(), "w"))) fail("--json: cannot write '" + json + "'");
  std::printf("%-34s %-46s %10s    %7s %6s %9s %6s %9s %6s %7s  %s\n", "name", "shape", "time", "GB/s", "of BW", "floor", "floor/", "peer", "peer/", "spread", "checks");
}

Report::~Report() {
  if (file_) std::fclose(file_);
}

void Report::add(const Row& row) {
  const double scale = row.unit == "ms" ? 1e3 : 1e6, rate = row.seconds > 0 ? row.bytes / row.seconds : 0;
  std::printf("%-34s %-46s %10s %s %7s %6s %9s %6s %9s %6s %6.1f%%  %s\n", row.name.c_str(), row.shape.c_str(), cell(row.seconds * scale, "%.3f").c_str(), row.unit.c_str(),
              cell(rate / 1e9, "%.0f").c_str(), cell(rate / bandwidth_, "%.2f").c_str(), cell(row.floor * scale, "%.3f").c_str(),
              cell(row.seconds > 0 ? row.floor / row.seconds : 0, "%.2f").c_str(), cell(row.peer_seconds * scale, "%.3f").c_str(),
              cell(row.seconds > 0 ? row.peer_seconds / row.seconds : 0, "%.2f").c_str(), row.spread * 100, row.checks.c_str());
  std::fflush(stdout);
  correct_ = correct_ && row.correct;
  if (!file_ || !row.evidence || !row.correct) return;
  const bool peer = !row.peer.empty() && row.peer_seconds > 0;
  std::fprintf(file_,
               "{\"machine\": %s, \"name\": %s, \"shape\": %s, \"value\": %s, \"unit\": %s, \"floor\": %s, \"peer\": %s, \"peer_value\": %s, \"spread\": %s, "
               "\"read_bandwidth\": %s}\n",
               quoted(machine_).c_str(), quoted(row.name).c_str(), quoted(row.shape).c_str(), number(row.seconds * scale).c_str(), quoted(row.unit).c_str(),
               number_or_null(row.floor * scale).c_str(), peer ? quoted(row.peer).c_str() : "null", peer ? number(row.peer_seconds * scale).c_str() : "null",
               number(row.spread).c_str(), number(bandwidth_).c_str());
  std::fflush(file_);
}

}  // namespace specrt::bench
