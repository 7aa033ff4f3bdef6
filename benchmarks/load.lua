-- For wrk: each thread sends one body over and over, and every response is compared with the one that is known.
-- $REQUESTS names a file with a line for each: body file, content type, key, then label and probability by turns, all
-- separated by tabs; of each image in the body its best label, in order.
-- With $RESPONSES, a folder, each thread must have one connection: it writes a record of every response into a file there,
-- which benchmarks.load.RESPONSE describes. With $RATE too, so many requests a second leave all the threads together, in
-- turn, at times that are fixed beforehand from $START on, whatever the responses take; one whose connection still waits
-- leaves as soon as it is free.

local responses, rate = os.getenv("RESPONSES"), tonumber(os.getenv("RATE"))
local tolerance = tonumber(os.getenv("TOLERANCE") or 1e-3)  -- of a probability
local lines, threads, now, record, bytes = {}, {}, nil, nil, nil
for line in io.lines(os.getenv("REQUESTS")) do lines[#lines + 1] = line end

if responses then
  local ffi = require("ffi")
  ffi.cdef([[
    typedef struct { long seconds, nanoseconds; } moment;
    typedef struct { double due, sent, done; int status, correct; } response;
    int clock_gettime(int clock, moment *now);
  ]])
  local moment = ffi.new("moment")
  record = ffi.new("response")
  bytes = function() return ffi.string(record, ffi.sizeof(record)) end
  now = function()  -- as Python's time.monotonic
    ffi.C.clock_gettime(1, moment)
    return tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
  end
end

if rate then
  function delay()  -- ms before the next request of this thread
    due = due + period
    return math.max(0, 1000 * (due - now()))
  end
end

function setup(thread)
  thread:set("line", lines[#threads % #lines + 1])
  thread:set("number", #threads)
  threads[#threads + 1] = thread
end

function init()
  local words = {}
  for word in line:gmatch("[^\t]+") do words[#words + 1] = word end
  local image = assert(io.open(words[1], "rb"))
  wrk.method, wrk.body = "POST", image:read("*a")
  image:close()
  wrk.headers["Content-Type"] = words[2]
  wrk.headers["Authorization"] = "Bearer " .. words[3]
  labels, values = {}, {}
  for i = 4, #words, 2 do
    labels[#labels + 1] = words[i]
    values[#values + 1] = tonumber(words[i + 1])
  end
  good, wrong, first = 0, 0, ""
  message = wrk.format()
  if responses then file = assert(io.open(responses .. "/" .. number, "wb")) end
  if rate then
    period = tonumber(os.getenv("CONNECTIONS")) / rate
    due = tonumber(os.getenv("START")) + number / rate - period
  end
end

function request()
  if responses then
    record.sent = now()
    record.due = rate and due or record.sent
  end
  return message
end

function response(status, headers, body)
  local count = 0
  if status == 200 then
    for label, value in body:gmatch('{%s*"([^"]+)":%s*([%d.e-]+)') do
      if label ~= labels[count + 1] or math.abs(tonumber(value) - values[count + 1]) > tolerance then break end
      count = count + 1
    end
  end
  if count == #labels then
    good = good + 1
  else
    wrong = wrong + 1
    first = first ~= "" and first or status .. " " .. body:sub(1, 200)
  end
  if responses then
    record.done, record.status, record.correct = now(), status, count == #labels and 1 or 0
    file:write(bytes())
  end
end

function done(summary, latency)
  local correct, bad, errors = 0, 0, summary.errors
  local said = ""
  for _, thread in ipairs(threads) do
    correct, bad = correct + thread:get("good"), bad + thread:get("wrong")
    if thread:get("first") ~= "" then said = thread:get("first") end
  end
  io.write(string.format("RESULT %d %d %d %f %f %f %s\n", correct, bad,
    errors.connect + errors.read + errors.write + errors.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, said:gsub("%s+", " ")))
end
