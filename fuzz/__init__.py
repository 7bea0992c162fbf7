"""Coverage-guided fuzzing of what strangers send: ``python -m fuzz frames --seconds 900`` (needs atheris), see CONTRIBUTING.md.

targets/frames.py    frames, fragments, openings, coded rows
targets/records.py   the directory's records, bodies and requests
seeds.py             real encodings to begin with
regressions/         inputs that once broke a target; the ordinary tests run them, and the seeds, without atheris
"""
