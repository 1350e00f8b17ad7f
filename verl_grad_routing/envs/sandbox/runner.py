"""Inside the sandbox: call the candidate's function on every input and report what it returns. No verdict here."""

import harness


def main():
    job, answer = harness.receive()
    try:
        function = harness.find(harness.load(job), job["entry"])
    except BaseException as error:
        results = [["error", type(error).__name__] for _ in job["calls"]]
    else:
        results = [harness.call(function, arguments) for arguments in job["calls"]]
    harness.send(answer, {"results": results})


main()
