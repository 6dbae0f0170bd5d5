# Finds torch by asking the interpreter. find_package(Torch) is not used: it rewrites CUDA architecture flags and drags in
# Caffe2's idea of CUDA, which a build without a GPU does not have.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "import torch, os; print(os.path.dirname(torch.__file__)); print(torch.__version__); print(torch.version.cuda or '')"
  OUTPUT_VARIABLE torch_facts RESULT_VARIABLE torch_failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_failed)
  message(FATAL_ERROR "specrt: ${Python3_EXECUTABLE} cannot import torch; install it first (see the README)")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts};")
list(GET torch_facts 0 TORCH_DIR)
list(GET torch_facts 1 TORCH_VERSION)
list(GET torch_facts 2 TORCH_CUDA_VERSION)
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR}, CUDA '${TORCH_CUDA_VERSION}'")

add_library(specrt_torch INTERFACE)
target_include_directories(specrt_torch SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_directories(specrt_torch INTERFACE ${TORCH_DIR}/lib)
target_link_libraries(specrt_torch INTERFACE torch_cpu c10)
# The stable ABI of torch 2.11: one set of sources for every torch from there on.
target_compile_definitions(specrt_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
