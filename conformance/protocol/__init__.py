"""The protocol's own tests, layer by layer: transcripts, simulation, mutants, fuzz. docs/testing.md tells what each finds."""
