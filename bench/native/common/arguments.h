// Command lines of the benchmark binaries: --rows A,B  --list  --json FILE  --help, and what a binary adds.
#pragma once
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

namespace specrt::bench {

class Arguments {
 public:
  // `rows`: the names that --rows takes. `values`, `switches`: further options with and without a value. `usage`: what --help says of the binary.
  // Throws std::runtime_error on anything else, naming it and what would be accepted.
  Arguments(int argc, char** argv, std::string usage, std::vector<std::string> rows, std::vector<std::string> values = {},
            std::vector<std::string> switches = {});

  // --help or --list: it was answered on stdout, there is nothing to measure.
  bool answered() const { return answered_; }
  bool wants(const std::string& row) const;
  bool has(const std::string& option) const { return given_.count(option) != 0; }
  std::string value(const std::string& option, const std::string& otherwise) const { return has(option) ? given_.at(option) : otherwise; }

 private:
  bool answered_ = false;
  std::vector<std::string> wanted_;
  std::map<std::string, std::string> given_;
};

// Splits at every `separator`; empty pieces are kept.
std::vector<std::string> split(const std::string& text, char separator);

// main: runs `body`, whose result says whether every check passed. Exit status 0; 1: a check failed; 2: an error, on stderr.
template <typename Body> int run(const char* program, Body&& body) {
  try {
    return body() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 2;
  }
}

}  // namespace specrt::bench
