"""What holds for every test."""

import hypothesis

# A busy machine is no failure: an example may take as long as it takes.
hypothesis.settings.register_profile("mlseg", deadline=None)
hypothesis.settings.load_profile("mlseg")
