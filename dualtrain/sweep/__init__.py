"""Many runs: sweeps over recipe keys, and what to read off them.

``command``                    the options of ``sweep``, ``fit``, ``alpha`` and ``compare``
``definition``, ``directory``  the points of a sweep, and what became of each on disk
``run``, ``plan``              ``dualtrain sweep``, and its dry run
``runner``, ``view``           running points, and what the terminal shows
``reading``, ``results``       settings, metrics and evaluations of any runs
``fit``, ``fit_file``          ``dualtrain fit``, and what it writes
``surface``, ``advice``        the Gaussian process over (repetitions, alpha); the best alpha
``compare``, ``groups``        ``dualtrain compare``: of runs, and of a sweep's points over seeds
``intervals``                  differences between runs over seeds and over documents
``figures``, ``output``        all figures; tables on the terminal
"""
