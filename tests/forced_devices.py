"""How tests start processes with forced CPU devices."""

# A device that waits for another ends the process after so long: a loaded machine needs more than the usual 40 s.
# Compiling is most of what these tests do, and toys gain nothing from LLVM's optimizations.
XLA_FLAGS = (
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
