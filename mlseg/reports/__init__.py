"""The page of a run: its directory read, and shown as one file that opens anywhere.

``mlseg.run`` and ``mlseg.report`` make pages; nothing else imports this. What a system adds to a
page it registers with ``mlseg.problems.reporting``.
"""
