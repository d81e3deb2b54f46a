# Front door over cmake: this file describes no build, CMakeLists.txt does. Needs GNU make.
BUILD ?= build
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 60
DEVICE ?= cuda:0
CMAKE_FLAGS ?=

ccache := $(shell command -v ccache)
ifneq ($(ccache),)
launchers := -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache
endif
configure = cmake -S . -G Ninja $(launchers) $(CMAKE_FLAGS)
# -O1: a sanitizer build that is quick to make and to run.
sanitized = $(configure) -DLOWBIT_CUDA=off -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1"
compute_sanitizer = $(firstword $(shell command -v compute-sanitizer) \
  /usr/local/cuda/bin/compute-sanitizer)
sources = $(shell find formats engine cuda eval bench vision tests -type f \
  '(' -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' ')' 2>/dev/null)

.PHONY: all deps demo test test-gpu parity asan tsan sanitize-cuda fuzz conformance data-given format tidy \
  clean

all:
	$(configure) -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS)

# Installs what is missing through apt; does nothing when everything is there.
deps:
	.ci/deps build

demo: deps
	$(MAKE) all
	cd $(BUILD) && bash $(CURDIR)/tests/demo.sh

test: deps
	$(MAKE) all
	cd $(BUILD) && ctest --output-on-failure

# The same operations on the CPU and on DEVICE, compared.
parity: all
	$(BUILD)/parity_tests --device $(DEVICE)

test-gpu: test
	$(MAKE) parity

asan:
	$(sanitized) -B build-asan -DLOWBIT_SANITIZE=address,undefined
	cmake --build build-asan -j $(JOBS)
	cd build-asan && ctest --output-on-failure

tsan:
	$(sanitized) -B build-tsan -DLOWBIT_SANITIZE=thread
	cmake --build build-tsan -j $(JOBS)
	cd build-tsan && ctest --output-on-failure

# racecheck also reports the split sums of cuBLAS (nvjet kernels), which are not ours to judge.
sanitize-cuda: all
	$(compute_sanitizer) --tool memcheck --leak-check full --error-exitcode 1 \
	  $(BUILD)/parity_tests --device $(DEVICE)
	$(compute_sanitizer) --tool racecheck $(BUILD)/parity_tests --device $(DEVICE) \
	  >$(BUILD)/racecheck.log 2>&1 || { tail -n 50 $(BUILD)/racecheck.log; exit 1; }
	! grep 'Race reported' $(BUILD)/racecheck.log | grep -v 'at nvjet_'

fuzz:
	.ci/deps fuzz
	$(configure) -B build-fuzz -DLOWBIT_CUDA=off -DLOWBIT_TESTS=OFF -DLOWBIT_FUZZ=ON \
	  -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DLOWBIT_SANITIZE=address,undefined
	cmake --build build-fuzz -j $(JOBS) --target fuzz_targets
	bash tests/fuzz/run.sh build-fuzz $(FUZZ_SECONDS)

# Compares with public vocabularies and data sets in DATA, which this repository does not hold.
conformance: data-given all
	$(BUILD)/conformance_tests --data $(DATA)

data-given:
	@test -d '$(DATA)' || { echo 'usage: make conformance DATA=dir' >&2; exit 2; }

format:
	.ci/deps lint
	clang-format -i $(sources)

tidy:
	.ci/deps lint
	$(configure) -B $(BUILD)
	find formats engine eval -name '*.cpp' -print0 | \
	  xargs -0 -n 1 -P $(JOBS) clang-tidy --quiet -p $(BUILD) \
  --extra-arg=-Wno-unknown-warning-option

clean:
	rm -rf build build-asan build-tsan build-fuzz build-ci-results
