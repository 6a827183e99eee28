"""The process around it all: errors, command lines, files, ranks, and what suits a CPU."""
