// What a binary says: one line a row on stdout, and with --json one JSON object a line, written as soon as the row is measured.
#pragma once
#include <cstdio>
#include <string>

namespace specrt::bench {

struct Row {
  std::string name, shape, unit = "us";  // unit of the row: "us" or "ms"
  double seconds = 0, spread = 0;        // median of the repeats; (max - min) / median
  double bytes = 0;                      // that have to be read or written: for GB/s; 0: not said
  double floor = 0;                      // seconds: the least that those bytes allow; 0: not known
  std::string peer;                      // another implementation, measured in this run; "": none
  double peer_seconds = 0;
  bool correct = true;                   // against the reference; a wrong result is no evidence and is not written
  std::string checks;                    // what was compared, and how it came out
  bool evidence = true;                  // written to the JSON file
};

class Report {
 public:
  // Prints what it runs on. `json`: the file, or "".
  Report(const std::string& json, const std::string& machine, double read_bandwidth);  // bytes a second
  ~Report();
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  void add(const Row& row);
  bool all_correct() const { return correct_; }

 private:
  std::FILE* file_ = nullptr;
  std::string machine_;
  double bandwidth_;
  bool correct_ = true;
};

}  // namespace specrt::bench
