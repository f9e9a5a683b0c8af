"""The protocol's own tests in layers: transcripts, simulation, mutants, fuzz. docs/testing.md says what each finds."""
