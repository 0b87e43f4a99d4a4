"""The judge: what an implementation's answers may differ by, what to ask it, and how to say what was found.

The rooms in order of use: `candidates` finds and wraps the implementation, `probes` chooses the calls, `profiles` and `tolerance` say how
far a correct answer may be off, element by element, `judge` compares, `localise` looks for what failing rows have in common, `report`
says it.
"""
