"""One folder per question: what is measured, how it is judged, its figures and its page, and its controls."""
