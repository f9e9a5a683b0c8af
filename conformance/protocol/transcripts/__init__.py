"""Golden transcripts: what the two sides say to each other, for people who write the protocol in another language.

The JSON files beside this page are the transcripts; docs/transcripts.md explains the format. `recorder` makes them from
the production machines, `replay` holds machines to them.
"""
