// Runs the conformance tests: they compare with public data sets and vocabularies, which are not
// part of this repository, in a directory given on the command line.
#include <gtest/gtest.h>

#include <filesystem>
#include <iostream>
#include <string_view>

std::filesystem::path conformance_dir;

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc != 3 || std::string_view(argv[1]) != "--data") {
    std::cerr << "usage: " << argv[0]
              << " --data DIR [GoogleTest options]\n"
                 "DIR holds tokenizers/llama3, tokenizers/llama2, data/text and models/tiny\n";
    return 2;
  }
  conformance_dir = argv[2];
  if (!std::filesystem::is_directory(conformance_dir)) {
    std::cerr << "--data " << conformance_dir.string() << ": not a directory\n";
    return 2;
  }
  return RUN_ALL_TESTS();
}
