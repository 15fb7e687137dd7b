"""Synthetic chest radiographs ("phantoms") with reports: made from random parameters, without data or licence.

With them, anyone can demonstrate, test and time the toolkit. They are synthetic images of no patient; results on them
say nothing about clinical performance.

    parameters.py   parameters of a phantom: anatomy, findings, film
    sampling.py     draws parameters, with the co-occurrence of findings
    grid.py         coordinates, smooth curves, noise
    anatomy.py      shape of the thorax: lungs, heart, mediastinum, diaphragm, body
    bones.py        ribs, spine, clavicles, shoulders
    ink.py          thin tubes: vessels, lines, wires
    vessels.py      pulmonary vessels
    disease.py      effects of findings on the lungs
    devices.py      tubes, catheters, pacemakers
    distractors.py  structures that look like findings; lead letters
    profile.py      shape of the thorax from the side
    lateral.py      the lateral film
    lateral_findings.py  findings and devices from the side
    film.py         from attenuation to grey: scatter, noise, exposure, borders
    render.py       renders a film from all parts
    report.py       findings and impression from the same parameters
    reader.py       reads labels from a report
"""
