"""Many runs: sweeps over recipe keys, and what to read off them.

``definition``, ``directory``  the points of a sweep, and what became of each on disk
``runner``, ``view``           running them, and what the terminal shows
``estimate``                   how long they will take
``results``                    settings, metrics and evaluations of any runs
``surface``, ``advice``        the Gaussian process over (repetitions, alpha); the best alpha
``intervals``                  differences between runs over seeds and over documents
``figures``, ``tables``        all figures; tables on the terminal
``command``, ``fit``           ``dualtrain sweep`` and ``dualtrain fit``
``compare``, ``groups``        ``dualtrain compare``: of runs, and of a sweep's points over seeds
"""
